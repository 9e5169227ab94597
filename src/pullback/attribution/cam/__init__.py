"""Class activation maps: an activation's channels, weighted by what the model says of them.

All of them multiply an activation ``[batch channel ...]`` by weights for each channel, or each entry, and sum over
channels. They differ in the weights: from the gradient, from the score of the input behind a channel's mask, from the
score without the channel, or from the activation alone.

Token layers have no channels first and no positions. `tokens` says how they lie:

- `None`: ``[batch token channel]`` of an image ``[batch channel height width]`` is laid out on a grid with the aspect
  of the image; leading class and register tokens are left out. ``[batch height width channel]`` is told from
  ``[batch channel height width]`` by the aspect, where only the former fits (Swin);
- ``(rows, columns)``: the last ``rows * columns`` tokens are that grid;
- ``"channels_last"``: ``[batch ... channel]``; ``"channels_first"``: as it is;
- a function from the activation to ``[batch channel ...]``.
"""
