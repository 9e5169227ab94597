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

from pullback.cam.by_classifier import cam as cam
from pullback.cam.by_gradient import elementwise_grad_cam as elementwise_grad_cam
from pullback.cam.by_gradient import grad_cam as grad_cam
from pullback.cam.by_gradient import grad_cam_plus_plus as grad_cam_plus_plus
from pullback.cam.by_gradient import hires_cam as hires_cam
from pullback.cam.by_gradient import layer_cam as layer_cam
from pullback.cam.by_gradient import linear_approx as linear_approx
from pullback.cam.by_gradient import smooth_grad_cam_plus_plus as smooth_grad_cam_plus_plus
from pullback.cam.by_gradient import xgrad_cam as xgrad_cam
from pullback.cam.by_score import ablation_cam as ablation_cam
from pullback.cam.by_score import is_cam as is_cam
from pullback.cam.by_score import score_cam as score_cam
from pullback.cam.by_score import ss_cam as ss_cam
from pullback.cam.channels import Tokens as Tokens
from pullback.cam.channels import gridded as gridded
from pullback.cam.eigen import eigen_cam as eigen_cam
from pullback.cam.eigen import eigen_grad_cam as eigen_grad_cam
from pullback.cam.eigen import principal as principal
from pullback.cam.joined import finer_cam as finer_cam
from pullback.cam.joined import fused_cam as fused_cam
from pullback.cam.joined import guided_grad_cam as guided_grad_cam
from pullback.cam.joined import refine_cam as refine_cam
