"""What torch keeps to itself: transforms, levels of derivatives, random numbers by place, the heap."""
