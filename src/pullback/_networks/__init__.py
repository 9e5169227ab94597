"""Networks by name with the preprocessing and class names that belong to them, and photographs read for them.

What the command line needs besides the library. Nothing is ever downloaded: weights come from an installed package or
from a file. A mistake that a user can mend is raised as `Problem`, a message that says what and how.
"""

from pullback._networks.messages import Problem as Problem
