"""Attention maps against their definitions, on attention as it is written here and there."""

import pytest
import torch
from torch import Tensor, nn

from pullback import attention_relevance, attention_rollout, attention_weights, over_targets, params_of


class Written(nn.Module):
    """Two layers of attention by hand, the weights kept."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 3)
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.kept = []
        for _ in range(2):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(-2, -1)).softmax(-1)
            self.kept.append(weights)
            x = x + (weights @ v).transpose(1, 2).flatten(2)
        return self.head(x[:, 0])


def test_rollout_is_the_product():
    model, x = Written().double(), torch.randn(2, 5, 4, dtype=torch.float64)
    model(x)
    first, second = ((w.mean(1) + torch.eye(5)) / 2 for w in model.kept)
    torch.testing.assert_close(attention_rollout(params_of(model), model, x), (second @ first).detach())


def test_relevance_is_its_recursion():
    model, x = Written().double(), torch.randn(2, 5, 4, dtype=torch.float64)
    score = model(x)[:, 1].sum()
    gradients = torch.autograd.grad(score, model.kept)
    total = torch.eye(5, dtype=torch.float64)
    for w, g in zip(model.kept, gradients):
        total = total + (w * g).clamp(min=0).mean(1) @ total
    found = attention_relevance(params_of(model), model, x, 1)
    torch.testing.assert_close(found, total.detach())
    together = over_targets(attention_relevance)(params_of(model), model, x, [0, 1])
    torch.testing.assert_close(together[1], found)


def test_fused_modules_are_read():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(3, 4, 8)
    weights = attention_weights(params_of(model), model, x)
    n = model.layers[0]
    _, expected = n.self_attn(x, x, x, average_attn_weights=False)
    assert len(weights) == 2
    torch.testing.assert_close(weights[0], expected.detach())


def test_timm_and_transformers_are_read():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=12, num_heads=3, img_size=32, num_classes=4)
    model, x = model.eval(), torch.randn(2, 3, 32, 32)
    assert attention_rollout(params_of(model), model, x).shape == (2, 5, 5)
    assert attention_relevance(params_of(model), model, x, 1).shape == (2, 5, 5)

    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    ids = {"input_ids": torch.tensor([[1, 2, 3, 4]])}
    maps = []
    for kind in ("eager", "eager" if torch.__version__.startswith("2.0.") else "sdpa"):  # there it refuses to be asked
        torch.manual_seed(0)
        config = transformers.BertConfig(vocab_size=30, num_labels=3, attn_implementation=kind, **sizes)
        bert = transformers.BertForSequenceClassification(config).eval()
        maps.append(attention_relevance(params_of(bert), bert, ids, 1, output="logits"))
    torch.testing.assert_close(*maps)


def test_errors():
    with pytest.raises(ValueError, match="`model` has no self-attention"):
        attention_rollout({}, nn.Linear(2, 2), torch.ones(1, 2))
