"""Operations that the library runs in a form of its own: torch's numbers and gradients, and more transforms.

Each is called from a pure function model, so that what is compared is what an explanation really computes.
"""

import itertools

import pytest
import slow
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

from pullback import gradient, params_of

some = settings(max_examples=40, deadline=None, derandomize=True)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def agrees(function, x: Tensor) -> None:
    """Output and gradient of `function` inside an explanation are those of torch outside it."""
    outside = function(x)
    weights = drawn(*outside.shape, seed=9)
    seen = []

    def score(out: Tensor) -> Tensor:
        seen.append(out)
        return (out * weights).flatten(1).sum(1)

    ours = gradient({}, lambda params, x: function(x), x, score)
    torch.testing.assert_close(ours, slow.gradient(function, x, score), rtol=1e-9, atol=1e-10)
    many = vmap(lambda k: gradient({}, lambda params, x: function(x), x, k * torch.ones_like(outside)))
    scale = torch.tensor([1.0, -2.0], dtype=torch.float64)
    loop = torch.stack([slow.gradient(function, x, k * torch.ones_like(outside)) for k in scale])
    torch.testing.assert_close(many(scale), loop, rtol=1e-9, atol=1e-10)


@some
@given(
    causal=st.booleans(),
    mask=st.sampled_from([None, "bool", "bool with an empty row", "float"]),
    scale=st.sampled_from([None, 0.3]),
    queries=st.integers(1, 4),
    grouped=st.booleans(),
)
def test_scaled_dot_product_attention(causal, mask, scale, queries, grouped):
    heads, keys, width = 4, 3, 2
    kv = drawn(2, heads // 2 if grouped else heads, keys, width, seed=1)
    attn_mask = None
    if mask == "float":
        attn_mask = drawn(queries, keys, seed=2)
    elif mask is not None:
        attn_mask = drawn(queries, keys, seed=2) > -0.5
        attn_mask[:, 0] = True
        if mask.endswith("row"):
            attn_mask[0] = False
    known = F.scaled_dot_product_attention.__doc__ or ""  # torch 2.0 has neither scale nor enable_gqa
    if (causal and mask) or (scale is not None and "scale=" not in known) or (grouped and "enable_gqa=" not in known):
        return
    x = drawn(2, heads, queries, width)

    def attend(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            x,
            kv,
            2 * kv,
            attn_mask=attn_mask,
            is_causal=causal,
            **({} if scale is None else {"scale": scale}),
            **({"enable_gqa": True} if grouped else {}),
        )

    if attend(x).isnan().any():  # an older torch, at a row that may look at nothing
        return
    agrees(attend, x)


@pytest.mark.parametrize(
    ("bias", "bias_kv", "zero", "separate", "weights", "average"),
    [
        (True, False, False, False, False, True),
        (True, False, False, False, True, True),
        (True, False, False, False, True, False),
        (False, True, False, False, True, True),
        (True, False, True, False, False, True),
        (True, True, True, True, True, True),
    ],
)
@pytest.mark.parametrize("masks", ["none", "attention", "padding", "both", "per head", "causal"])
def test_multi_head_attention(bias, bias_kv, zero, separate, weights, average, masks):
    width = 6
    attention = nn.MultiheadAttention(
        width,
        2,
        bias=bias,
        add_bias_kv=bias_kv,
        add_zero_attn=zero,
        kdim=4 if separate else None,
        vdim=5 if separate else None,
        batch_first=True,
    )
    attention = attention.double().eval()
    for k, parameter in enumerate(attention.parameters()):
        parameter.data = drawn(*parameter.shape, seed=k)
    key = drawn(2, 4, 4 if separate else width, seed=21)
    value = drawn(2, 4, 5 if separate else width, seed=22)
    causal = torch.triu(torch.ones(3, 4, dtype=torch.bool), diagonal=1)
    padding = torch.tensor([[False, False, False, True], [False, False, False, False]])
    options = {
        "none": {},
        "attention": {"attn_mask": drawn(3, 4, seed=23)},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": causal, "key_padding_mask": padding},
        "per head": {"attn_mask": drawn(4, 3, 4, seed=24)},
        "causal": {"attn_mask": causal, "is_causal": True},
    }[masks]

    def attend(x: Tensor) -> Tensor:
        out, attended = attention(x, key, value, need_weights=weights, average_attn_weights=average, **options)
        return out if attended is None else torch.cat([out.flatten(1), attended.flatten(1)], 1)

    agrees(attend, drawn(2, 3, width))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder(padded, first, norm_first):
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.3, batch_first=first, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    padding = torch.tensor([[False, False, True], [False, False, False]]) if padded else None

    def encode(x: Tensor) -> Tensor:
        tokens = x if first else x.transpose(0, 1)
        out = encoder(tokens, src_key_padding_mask=padding)
        return out if first else out.transpose(0, 1)

    agrees(encode, drawn(2, 3, 6))


@some
@given(
    axes=st.integers(0, 3),
    batch=st.integers(1, 2),
    affine=st.booleans(),
    tracked=st.booleans(),
    contiguous=st.booleans(),
)
def test_batch_norm(axes, batch, affine, tracked, contiguous):
    if not tracked and batch == 1 and axes == 0:
        return  # one value has no variance, torch refuses it
    shape = [batch, 3, *[4, 3, 2][:axes]]
    x = drawn(*shape)
    mean, var = (drawn(3, seed=5), drawn(3, seed=6).abs() + 0.5) if tracked else (None, None)
    weight, bias = (drawn(3, seed=7), drawn(3, seed=8)) if affine else (None, None)

    def reference(x: Tensor) -> Tensor:
        column = (-1, *[1] * axes)
        dims = [0, *range(2, x.ndim)]
        m = x.mean(dims) if mean is None else mean
        v = x.var(dims, unbiased=False) if var is None else var
        unit = (x - m.reshape(column)) / (v.reshape(column) + 1e-3).sqrt()
        return unit if weight is None or bias is None else unit * weight.reshape(column) + bias.reshape(column)

    def norm(x: Tensor) -> Tensor:
        return F.batch_norm(x, mean, var, weight, bias, training=mean is None, eps=1e-3)

    torch.testing.assert_close(norm(x), reference(x))
    weights = drawn(*reversed(shape), seed=9).permute(*reversed(range(len(shape))))
    weights = weights.contiguous() if contiguous else weights

    def score(out: Tensor) -> Tensor:
        return (out * weights).flatten(1).sum(1)

    if tracked:
        ours = gradient({}, lambda params, x: norm(x), x, score)
        torch.testing.assert_close(ours, slow.gradient(reference, x, score))


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_instance_norm(tracked, batch):
    norm = nn.InstanceNorm2d(3, affine=True, track_running_stats=tracked).double().eval()
    if tracked:
        norm.running_mean, norm.running_var = drawn(3, seed=5), drawn(3, seed=6).abs() + 0.5
    x, weights = drawn(batch, 3, 4, 5), drawn(batch, 5, 4, 3, seed=9).permute(0, 3, 2, 1)

    def score(out: Tensor) -> Tensor:
        return (out * weights).flatten(1).sum(1)

    ours = gradient(params_of(norm), norm, x, score)
    numeric = slow.finite_difference_gradient(lambda x: norm(x), x, score)
    torch.testing.assert_close(ours, numeric, rtol=1e-6, atol=1e-7)


DROPOUTS = {
    "F.dropout": lambda h: F.dropout(h, 0.5, training=True),
    "F.dropout in place": lambda h: F.dropout(h * 1, 0.5, True, True),
    "F.dropout1d": lambda h: F.dropout1d(h, 0.5, training=True),
    "F.alpha_dropout": lambda h: F.alpha_dropout(h, 0.5, training=True),
    "F.feature_alpha_dropout": lambda h: F.feature_alpha_dropout(h, 0.5, training=True),
    "torch.dropout": lambda h: torch.dropout(h, 0.5, True),
    "nn.Dropout built inside": lambda h: nn.Dropout(0.5).train()(h),
    "attention": lambda h: F.scaled_dot_product_attention(h, h, h, dropout_p=0.5),
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_that_cannot_be_switched_off_is_left_out_and_told(name):
    dropped = DROPOUTS[name]

    class Dropping(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (dropped(x) ** 2).sum(2)

    model, x = Dropping().eval(), drawn(2, 3, 4)
    before = torch.random.get_rng_state()
    with pytest.warns(UserWarning, match="[Dd]ropout"):
        ours = gradient({}, model, x, 1)
    assert torch.equal(torch.random.get_rng_state(), before)
    kept = (lambda h: F.scaled_dot_product_attention(h, h, h)) if name == "attention" else (lambda h: h)
    torch.testing.assert_close(ours, slow.gradient(lambda x: (kept(x) ** 2).sum(2), x, 1))


def test_an_embedding_with_a_bounded_norm_is_not_rescaled_in_place():
    embedding = nn.Embedding(6, 4, max_norm=0.5).double()
    model = nn.Sequential(embedding, nn.Flatten(), nn.Linear(8, 3)).double().eval()
    ids = torch.tensor([[1, 2], [5, 0]])
    before = embedding.weight.detach().clone()
    ours = gradient(params_of(model), model, ids, 1, layer="0")
    assert torch.equal(embedding.weight, before)
    torch.testing.assert_close(ours, params_of(model)["2.weight"][1].reshape(1, 2, 4).expand(2, -1, -1))
    out = []
    gradient(params_of(model), model, ids, lambda y: out.append(y.detach()) or y[:, 1], layer="0")
    with torch.no_grad():
        expected = model(ids)  # torch rescales the weight here
    assert not torch.equal(embedding.weight, before)
    assert any(torch.allclose(torch.as_tensor(y), expected) for y in out if y.device.type == "cpu")


def test_fast_paths_do_not_depend_on_the_grad_mode():
    encoder = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True).double().eval().requires_grad_(False)
    x = drawn(2, 3, 6)
    results = []
    switch = getattr(torch.backends, "mha", None)  # torch 2.0 has none
    modes = (torch.no_grad, torch.enable_grad, torch.inference_mode)
    for mode, fast in itertools.product(modes, (True,) if switch is None else (True, False)):
        before = switch is None or switch.get_fastpath_enabled()
        if switch is not None:
            switch.set_fastpath_enabled(fast)
        with mode():
            results.append(gradient(params_of(encoder), encoder, x, lambda out: out.square().sum((1, 2))))
        if switch is not None:
            switch.set_fastpath_enabled(before)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])
