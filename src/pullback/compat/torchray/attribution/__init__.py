"""Attribution methods, each in the module of its name; `common` holds what they share."""
