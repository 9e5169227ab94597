"""A run over a dataset gives what the methods give, whatever comes in its way."""

import errno
import os
import resource
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from pullback import (
    PullbackWarning,
    dataset,
    grad_cam,
    gradient,
    input_x_gradient,
    integrated_gradients,
    maps,
    params_of,
)
from pullback.dataset import explain_dataset, open_store, read

zarr = pytest.importorskip("zarr")

METHODS = {
    "gradient": gradient,
    "ig": partial(integrated_gradients, steps=3),
    "cam": partial(grad_cam, layer="0"),
}


def network(seed=0):
    torch.manual_seed(seed)
    layers = (nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(6, 5)).eval()


class Pictures(Dataset):
    """Examples made of their position, some of which cannot be read; it keeps account of what is read."""

    def __init__(self, length=23, broken=(), error=None, side=8):
        self.length, self.broken, self.side, self.asked = length, set(broken), side, []
        self.error = error or OSError("gone")

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        self.asked.append(i)
        if i in self.broken:
            raise self.error
        generator = torch.Generator().manual_seed(i)
        return torch.randn(3, self.side, self.side, generator=generator), i % 5


def explain(out, data=None, methods=METHODS, model=None, **options):
    model = network() if model is None else model
    options = {"targets": "top2", "batch_size": 4} | options
    return explain_dataset(methods, params_of(model), model, Pictures() if data is None else data, out=out, **options)


def arrays(store):
    return {name: store[name][:] for name in sorted(store)}


def assert_same(a, b):
    a, b = arrays(a), arrays(b)
    assert list(a) == list(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name, strict=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return explain(tmp_path_factory.mktemp("undisturbed") / "maps.zarr")


# -- what it gives -----------------------------------------------------------------------------------------------------


def test_it_holds_what_the_methods_give(undisturbed):
    model, data = network(), Pictures()
    params = params_of(model)
    for start in range(0, 23, 4):
        rows = slice(start, min(start + 4, 23))
        x = torch.stack([data[i][0] for i in range(*rows.indices(23))])
        best = model(x).topk(2)
        assert undisturbed["targets"][rows].tolist() == best.indices.tolist()
        assert np.allclose(undisturbed["scores"][rows], best.values.detach())
        for k in range(2):
            for name, method in METHODS.items():
                expected = method(params, model, x, best.indices[:, k])
                assert np.allclose(undisturbed[name][rows, k], expected, atol=1e-6), name
    assert undisturbed["labels"][:].tolist() == [i % 5 for i in range(23)]
    assert undisturbed["ids"][:].tolist() == [str(i) for i in range(23)]
    assert (undisturbed["status"][:] == 1).all()
    assert set(undisturbed["errors"][:]) == {""}


def test_it_says_how_it_was_made(undisturbed):
    held = dict(undisturbed.attrs)
    assert held["methods"]["ig"]["options"] == {"steps": 3}
    assert held["methods"]["gradient"] == {"function": "pullback.attribution.gradients.gradient", "options": {}}
    assert held["targets"] == "top2"
    assert held["model"] == "torch.nn.modules.container.Sequential"
    assert held["versions"]["torch"] == torch.__version__


def worst_and_label(y, labels):
    return torch.stack([y.argmin(1), labels], 1)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("label", lambda y, labels: labels[:, None]),
        ([3, 1], lambda y, labels: torch.tensor([[3, 1]] * 23)),
        (worst_and_label, worst_and_label),
    ],
)  # fmt: skip
def test_targets(tmp_path, targets, expected):
    store = explain(tmp_path / "s", methods=gradient, targets=targets)
    model, data = network(), Pictures()
    x, labels = torch.stack([data[i][0] for i in range(23)]), torch.arange(23) % 5
    y = model(x)
    want = expected(y, labels)
    assert store["targets"][:].tolist() == want.tolist()
    assert np.allclose(store["scores"][:], y.gather(1, want).detach(), atol=1e-6)
    for k in range(want.shape[1]):
        assert np.allclose(store["gradient"][:, k], gradient({}, model, x, want[:, k]), atol=1e-6)


def test_a_score_an_example_needs_no_target(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 1)).eval()
    store = explain(tmp_path / "s", methods=gradient, model=model, targets=None)
    assert "targets" not in store
    assert store["gradient"].shape == (23, 1, 3, 8, 8)
    assert np.allclose(store["gradient"][5, 0].reshape(-1), model[1].weight.detach()[0], atol=1e-6)
    assert np.allclose(store["scores"][5, 0], model(Pictures()[5][0][None]).item(), atol=1e-6)


def test_no_forward_but_those_of_the_methods(tmp_path):
    calls = []
    model = network()
    model.register_forward_hook(lambda *_: calls.append(1))
    explain(tmp_path / "a", methods=gradient, model=model, targets="label", scores=False)
    assert len(calls) == 6
    explain(tmp_path / "b", methods={"a": gradient, "b": gradient}, model=model, targets="top3")
    assert len(calls) == 6 + 6 * 3


def test_maps_in_place_of_attributions(tmp_path):
    methods = {"a": gradient, "b": input_x_gradient, "c": gradient, "cam": METHODS["cam"]}
    reduce = {"a": "peak", "b": "sum", "c": lambda a: a.square().mean(1, keepdim=True), "cam": "peak"}
    full, store = explain(tmp_path / "full", methods=methods), explain(tmp_path / "s", methods=methods, reduce=reduce)
    whole = {name: torch.from_numpy(full[name][:]).flatten(0, 1) for name in methods}
    assert np.array_equal(store["a"][:].reshape(46, 1, 8, 8), maps.channel_peak(whole["a"]))
    assert np.allclose(store["b"][:].reshape(46, 1, 8, 8), maps.channel_sum(whole["b"]), atol=1e-6)
    assert np.allclose(store["c"][:].reshape(46, 1, 8, 8), whole["c"].square().mean(1, keepdim=True), atol=1e-6)
    assert np.array_equal(store["cam"][:], full["cam"][:])
    both = explain(tmp_path / "both", methods=methods, reduce="sum")
    assert np.array_equal(both["b"][:], store["b"][:])


def test_half_precision_keeps_maps_however_small(tmp_path):
    model = network()
    with torch.no_grad():
        model[-1].weight.mul_(1e-9)  # gradients that float16 itself would round to zero
    full = explain(tmp_path / "full", model=model)
    half = explain(tmp_path / "half", model=model, dtype="float16")
    assert half["gradient"].dtype == np.float16
    for name in METHODS:
        exact, rounded = read(full, name), read(half, name)
        assert rounded.dtype == np.float32
        peak = np.abs(exact).max(axis=(2, 3, 4), keepdims=True)
        assert 0 < peak.min() < 1e-8
        assert (np.abs(exact - rounded) <= peak * 2**-11).all()
    assert np.array_equal(read(half, "gradient", 7), read(half, "gradient")[7])


def test_others_read_it(undisturbed):
    xarray = pytest.importorskip("xarray")
    path = undisturbed.store.root
    with xarray.open_zarr(path, consolidated=False) as found:
        assert found["gradient"].dims == ("example", "target", "channel", "height", "width")
        assert found["cam"].dims == ("example", "target", "cam_channel", "cam_height", "cam_width")
        assert found["targets"].dims == ("example", "target")
        assert np.array_equal(found["ig"].sel(target=1).values, undisturbed["ig"][:, 1])
    assert undisturbed["ig"].chunks == (4, 2, 3, 8, 8)


def test_several_inputs(tmp_path):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

        def forward(self, picture, ids):
            return self.head(self.embed(ids).mean(1) * picture)

    torch.manual_seed(0)
    model = Both().eval()
    rows = [{"picture": torch.randn(4), "ids": torch.randint(7, (5,)), "label": i % 3, "id": f"n{i}"} for i in range(6)]
    methods = {"x": gradient, "words": partial(gradient, layer="embed")}
    store = explain(tmp_path / "s", data=rows, methods=methods, model=model, targets="label")
    assert sorted(store) == ["errors", "ids", "labels", "scores", "status", "targets", "words", "x.picture"]
    assert store["ids"][:].tolist() == [f"n{i}" for i in range(6)]
    for i, row in enumerate(rows):
        x = {"picture": row["picture"][None], "ids": row["ids"][None]}
        assert np.allclose(store["x.picture"][i, 0], gradient({}, model, x, row["label"])["picture"], atol=1e-6)
        assert np.allclose(store["words"][i, 0], gradient({}, model, x, row["label"], layer="embed"), atol=1e-6)


def test_the_caller_keeps_its_random_numbers_and_model(tmp_path):
    model = network()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.random.get_rng_state()
    model.train()
    explain(tmp_path / "s", model=model)
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # where there is one core
def test_workers_change_nothing(tmp_path, undisturbed):
    assert_same(explain(tmp_path / "s", workers=2), undisturbed)


def test_progress(tmp_path, capsys):
    told = []
    explain(tmp_path / "s", methods=gradient, progress=lambda done, total: told.append((done, total)))
    assert told == [(0, 23), (4, 23), (8, 23), (12, 23), (16, 23), (20, 23), (23, 23), (23, 23)]
    told.clear()
    explain(tmp_path / "s", methods=gradient, progress=lambda done, total: told.append((done, total)))
    assert set(told) == {(23, 23)}
    explain(tmp_path / "s", methods=gradient, progress=True)
    assert "23/23" in capsys.readouterr().err


# -- streams -----------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __init__(self, length=23, breaks=None):
        self.length, self.breaks = length, breaks

    def __iter__(self):
        data = Pictures(self.length)
        for i in range(self.length):
            if i == self.breaks:
                raise OSError("the connection was lost")
            x, label = data[i]
            yield {"__key__": f"k{i}", "__url__": "a.tar", "jpg": x, "cls": label}


@pytest.mark.parametrize("workers", [0, 3])
def test_a_stream(tmp_path, undisturbed, workers):
    store = explain(tmp_path / "s", data=Stream(), workers=workers)
    assert store["ids"][:].tolist() == [f"k{i}" for i in range(23)]
    for name in set(undisturbed) - {"ids"}:
        np.testing.assert_array_equal(store[name][:], undisturbed[name][:], err_msg=name)


def test_a_generator(tmp_path, undisturbed):
    data = Pictures()
    assert_same(explain(tmp_path / "s", data=(data[i] for i in range(23))), undisturbed)


def test_a_stream_that_breaks_goes_on_with_the_next_run(tmp_path):
    with pytest.raises(RuntimeError, match="`data` broke after 9 examples: OSError: the connection was lost"):
        explain(tmp_path / "s", data=Stream(breaks=9))
    assert open_store(tmp_path / "s")["status"][:].tolist() == [1] * 8
    assert_same(explain(tmp_path / "s", data=Stream()), explain(tmp_path / "whole", data=Stream()))


def test_a_stream_in_shares(tmp_path):
    for rank in (2, 0, 1):
        explain(tmp_path / "s", data=Stream(), shard=(rank, 3))
    assert_same(open_store(tmp_path / "s"), explain(tmp_path / "whole", data=Stream()))


# -- interruptions -----------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, undisturbed):
    with pytest.raises(KeyboardInterrupt):
        explain(tmp_path / "s", data=Pictures(broken=[13], error=KeyboardInterrupt()))
    assert open_store(tmp_path / "s")["status"][:].tolist() == [1] * 12 + [0] * 11
    data = Pictures()
    assert_same(explain(tmp_path / "s", data=data), undisturbed)
    assert data.asked == list(range(12, 23))


def test_what_is_done_is_not_done_again(tmp_path):
    explain(tmp_path / "s")
    data = Pictures()
    explain(tmp_path / "s", data=data)
    assert data.asked == []


def test_shares(tmp_path, undisturbed):
    read_by = []
    for rank in (1, 0, 2, 3):  # 6 batches
        data = Pictures()
        explain(tmp_path / "s", data=data, shard=(rank, 4))
        read_by.append(data.asked)
    assert sorted(i for asked in read_by for i in asked) == list(range(23))
    assert_same(open_store(tmp_path / "s"), undisturbed)


def test_the_share_of_a_process_that_died(tmp_path, undisturbed):
    explain(tmp_path / "s", shard=(0, 2))
    with pytest.raises(KeyboardInterrupt):
        explain(tmp_path / "s", data=Pictures(broken=[13], error=KeyboardInterrupt()), shard=(1, 2))
    data = Pictures()
    assert_same(explain(tmp_path / "s", data=data), undisturbed)  # by any number of processes
    assert data.asked == [*range(12, 16), *range(20, 23)]


def test_more_processes_than_batches(tmp_path):
    for rank in range(3):
        explain(tmp_path / "s", data=Pictures(5), shard=(rank, 3)) if rank < 2 else None
    store = explain(tmp_path / "s", data=Pictures(5), shard=(2, 3))
    assert (store["status"][:] == 1).all()


def test_the_share_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert explain(tmp_path / "s", data=Pictures(8))["status"][:].tolist() == [0] * 4 + [1] * 4


# -- broken examples ---------------------------------------------------------------------------------------------------


class Picky(nn.Module):
    """Fails on an example whose first value is `bad`, as a model may."""

    def __init__(self, bad):
        super().__init__()
        self.net, self.bad = network(), bad

    def forward(self, x):
        if (x[:, 0, 0, 0] == self.bad).any():
            raise ArithmeticError("not this one")
        return self.net(x)


def assert_others_same(store, undisturbed, failed):
    rows = [i for i in range(23) if i not in failed]
    for name in undisturbed:
        np.testing.assert_array_equal(store[name][rows], undisturbed[name][rows], err_msg=name)
        if undisturbed[name].dtype.kind == "f":
            assert np.isnan(store[name][failed]).all()
    assert store["status"][failed].tolist() == [2] * len(failed)


def test_examples_that_cannot_be_read(tmp_path, undisturbed):
    failed = [1, 2, 8, 9, 10, 11, 22]  # some of a batch, all of a batch
    store = explain(tmp_path / "s", data=Pictures(broken=failed))
    assert_others_same(store, undisturbed, failed)
    assert set(store["errors"][failed]) == {"OSError: gone"}
    data = Pictures()
    assert explain(tmp_path / "s", data=data)["status"][:].tolist().count(2) == 7  # known to be broken
    assert data.asked == []
    assert_same(explain(tmp_path / "s", data=data, retry=True), undisturbed)
    assert data.asked == [*range(4), *range(8, 12), *range(20, 23)]


def test_the_first_batches_are_broken(tmp_path, undisturbed):
    failed = list(range(10))
    assert_others_same(explain(tmp_path / "s", data=Pictures(broken=failed)), undisturbed, failed)


def test_an_example_that_the_model_refuses(tmp_path):
    model = Picky(Pictures()[9][0][0, 0, 0].item())
    methods = {"gradient": gradient}
    store = explain(tmp_path / "s", model=model, methods=methods)
    whole = explain(tmp_path / "whole", model=model.net, methods=methods)
    assert_others_same(store, whole, [9])
    assert str(store["errors"][9]) == "ArithmeticError: not this one"


@pytest.mark.parametrize("odd", [torch.zeros(3, 9, 9), torch.zeros(3, 8, 8, dtype=torch.float64), "a.jpg", None])
def test_an_example_unlike_the_others(tmp_path, undisturbed, odd):
    rows = [Pictures()[i] for i in range(23)]
    rows[4] = (odd, 4)
    store = explain(tmp_path / "s", data=rows)
    assert_others_same(store, undisturbed, [4])
    assert "must be a tensor" in str(store["errors"][4]) or "where others are [3, 8, 8] float32" in str(
        store["errors"][4]
    )


def test_a_batch_unlike_the_others(tmp_path, undisturbed):
    rows = [Pictures()[i] for i in range(23)]
    rows[4:8] = [Pictures(side=9)[i] for i in range(4, 8)]
    store = explain(tmp_path / "s", data=rows)
    assert_others_same(store, undisturbed, [4, 5, 6, 7])
    assert "is [2, 3, 9, 9] for each example, where it was [2, 3, 8, 8]" in str(store["errors"][4])


def test_an_example_without_label_or_with_a_label_that_is_no_class(tmp_path):
    rows = [Pictures()[i] for i in range(8)]
    whole = explain(tmp_path / "whole", data=rows, targets="label")
    rows[1], rows[6] = (rows[1][0],), (rows[6][0], 5)
    store = explain(tmp_path / "s", data=rows, targets="label")
    assert store["status"][:].tolist() == [1, 2, 1, 1, 1, 1, 2, 1]
    assert "has no label" in str(store["errors"][1])
    assert "`target` must lie in 0 ... 4, got 5" in str(store["errors"][6])
    good = [0, 2, 3, 4, 5, 7]
    assert np.array_equal(store["gradient"][good], whole["gradient"][good])


def test_stop_at_an_error(tmp_path):
    with pytest.raises(RuntimeError, match=r"Example '13' \(position 13\): OSError: gone"):
        explain(tmp_path / "s", data=Pictures(broken=[13]), on_error="raise")
    with pytest.raises(RuntimeError, match=r"positions 8 to 11: ArithmeticError: not this one"):
        explain(tmp_path / "t", model=Picky(Pictures()[9][0][0, 0, 0].item()), on_error="raise", methods=gradient)


def test_a_call_that_explains_nothing(tmp_path):
    with pytest.raises(
        ValueError, match=r"None of the examples could be explained. The first one: ValueError: No layer"
    ):
        explain(tmp_path / "s", methods=partial(grad_cam, layer="nowhere"))
    assert not (tmp_path / "s").exists()
    with pytest.raises(ValueError, match="`data` has no examples"):
        explain(tmp_path / "s", data=[])


def test_a_wrong_call_is_told_before_all_is_read(tmp_path):
    data = Pictures(1000, broken=range(6))  # which is not what is wrong
    message = r"None of the first 66 examples could be explained. The first one: ValueError: No layer"
    with pytest.raises(ValueError, match=message):
        explain(tmp_path / "s", data=data, methods=partial(grad_cam, layer="nowhere"))
    assert data.asked == list(range(72))


def test_errors_of_the_machine_are_not_those_of_an_example(tmp_path):
    def hungry(params, model, x, target):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: not enough memory")

    with pytest.raises(RuntimeError, match="Out of memory: take a smaller `batch_size` or `chunk_size`"):
        explain(tmp_path / "s", methods={"m": hungry})


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"model": network(1)}, "`params` was"),
        ({"methods": METHODS | {"ig": partial(integrated_gradients, steps=4)}}, "`methods.ig.options.steps` was 3"),
        ({"methods": {"gradient": gradient}}, "`methods.ig` was .* and is null"),
        ({"methods": METHODS | {"gradient": input_x_gradient}}, "`methods.gradient.function` was"),
        ({"targets": "top3"}, '`targets` was "top2" and is "top3"'),
        ({"batch_size": 5}, "`batch_size` was 4 and is 5"),
        ({"reduce": "sum"}, "`reduce.gradient` was null"),
        ({"dtype": "float16"}, "`dtype` was"),
        ({"data": Pictures(24)}, "`length` was 23 and is 24"),
        ({"ids": [f"{i}.jpg" for i in range(23)]}, "`ids` was null"),
        ({"about": {"preprocessing": {"size": 9}}}, "`about.preprocessing` was null"),
        ({"model": nn.Sequential(*network()[:-1], nn.Identity(), network()[-1])}, "`structure` was"),
    ],
)  # fmt: skip
def test_a_store_of_another_run_is_refused(undisturbed, options, difference):
    with pytest.raises(ValueError, match=f"holds the results of another run: .*{difference}"):
        explain(undisturbed.store.root, **options)


def test_options_are_told_apart():
    from pullback.dataset._described import described

    def scaled(by):
        return lambda a: a * by

    same = [(scaled(2), scaled(2)), (torch.ones(3), torch.ones(3)), (partial(gradient, layer="0"),) * 2]
    other = [(scaled(2), scaled(3)), (lambda a: a, lambda a: -a), (torch.ones(3), torch.ones(3, 1)),
             (torch.ones(3), torch.ones(3).double()), (partial(gradient, layer="0"), partial(gradient, layer="1")),
             (lambda a: a.sum(1), lambda a: a.mean(1)), (maps.channel_sum, maps.channel_peak)]  # fmt: skip
    assert all(described(a) == described(b) for a, b in same)
    assert all(described(a) != described(b) for a, b in other)


def test_results_begun_elsewhere_are_told(tmp_path, monkeypatch):
    explain(tmp_path / "s", methods=gradient, shard=(0, 2))
    group = zarr.open_group(str(tmp_path / "s"), mode="r+")
    group.attrs["versions"] = group.attrs["versions"] | {"torch": "1.0"}
    with pytest.warns(PullbackWarning, match=r"begun elsewhere.*`versions.torch` was \"1.0\"") as told:
        explain(tmp_path / "s", methods=gradient)
    assert told[0].filename == __file__


def test_examples_that_are_gone_are_named(tmp_path):
    names = [f"{i}.jpg" for i in range(23)]
    explain(tmp_path / "s", methods=gradient, ids=names)
    for left, said in (
        (names[:7] + names[8:], "example '7.jpg' is no longer there. "),
        (names[:20], "'20.jpg'.*nor 2 more"),
    ):
        with pytest.raises(ValueError, match=said):
            explain(tmp_path / "s", methods=gradient, data=Pictures(len(left)), ids=left)
    with pytest.raises(ValueError, match="`ids` was") as told:  # more, or in another order
        explain(tmp_path / "s", methods=gradient, ids=names[::-1])
    assert "no longer" not in str(told.value)


def test_what_is_there_and_no_store(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is there and is no store of results"):
        explain(tmp_path)
    with pytest.raises(ValueError, match="is there and is no store of results"):
        explain(tmp_path / "notes.txt")
    zarr.open_group(str(tmp_path / "other"), mode="w")
    with pytest.raises(ValueError, match="no store of results in format 1"):
        explain(tmp_path / "other")
    with pytest.raises(ValueError, match="No store of results at"):
        open_store(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "best"}, "`targets` must be 'label', 'top5'"),
        ({"targets": []}, "`targets` must be a list of at least one class"),
        ({"targets": 3}, "`targets` must be a list"),
        ({"targets": "top9"}, "`targets` 'top9' needs an output .* of at least 9 classes"),
        ({"targets": lambda y, labels: labels}, r"`targets` must return classes \[batch target\]"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"chunk_size": 0}, "`chunk_size` must be at least 1, 'auto' or None"),
        ({"dtype": "float64"}, "`dtype` must be 'float16' or 'float32'"),
        ({"on_error": "ignore"}, "`on_error` must be"),
        ({"reduce": "mean"}, "`reduce` must be 'sum', 'peak'"),
        ({"reduce": {"lime": "sum"}}, "`reduce` must be for methods that are run"),
        ({"methods": {}}, "`method` must name at least one"),
        ({"methods": {"scores": gradient}}, "`method` must have names"),
        ({"methods": {"a/b": gradient}}, "`method` must have names"),
        ({"methods": {"a": partial(gradient, layer="0:")}}, "`layer` must read"),
        ({"methods": {"a": lambda params, model, x, target: x.sum()}}, r"`a` must give a tensor \[batch ...\]"),
        ({"ids": ["a"]}, "`ids` must name each of the 23 examples, got 1"),
        ({"shard": (2, 2)}, "`shard` must be"),
    ],
)  # fmt: skip
def test_bad_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        explain(tmp_path / "s", **options)
    assert list(tmp_path.iterdir()) == []


def test_bad_types(tmp_path):
    with pytest.raises(TypeError, match="`method` must be a function"):
        explain(tmp_path / "s", methods={"a": 3})
    with pytest.raises(TypeError, match="`data` must be a dataset, a sequence or an iterable"):
        explain(tmp_path / "s", data=7)
    with pytest.raises(ValueError, match="`name` must be one of cam, errors,"):
        read(explain(tmp_path / "s"), "lime")


# -- disks -------------------------------------------------------------------------------------------------------------


def damage(folder, chunk="2", where=-20):
    file = next(path for path in folder.iterdir() if path.name.split(".")[:2] == ["c", chunk])
    data = bytearray(file.read_bytes())
    data[where] ^= 0xFF
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["ig", "cam", "targets", "ids"])
def test_a_damaged_chunk(tmp_path, undisturbed, name):
    store = explain(tmp_path / "s")
    damage(tmp_path / "s" / name)
    with pytest.raises(ValueError, match=f"`{name}` of examples 8 to 11 is damaged in .*check=True"):
        read(store, name, slice(8, 12))
    assert len(read(store, name, slice(0, 8))) == 8
    data = Pictures()
    assert_same(explain(tmp_path / "s", data=data, check=True), undisturbed)
    assert data.asked == [8, 9, 10, 11]


@pytest.mark.parametrize("chunk", ["0", "5"])  # the last one is not full
def test_a_damaged_mark(tmp_path, undisturbed, chunk):
    explain(tmp_path / "s")
    damage(tmp_path / "s" / "status", chunk, where=0)
    with pytest.raises(ValueError, match="`status` of examples 0 to 22 is damaged"):
        explain(tmp_path / "s")
    assert_same(explain(tmp_path / "s", check=True), undisturbed)


def test_a_damaged_store(tmp_path):
    explain(tmp_path / "s", methods=gradient)
    (tmp_path / "s" / "zarr.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged, or no Zarr store"):
        explain(tmp_path / "s", methods=gradient)


@pytest.mark.parametrize("begun", [False, True])
def test_a_folder_that_cannot_be_written_to(tmp_path, begun):
    folder = tmp_path / "locked"
    folder.mkdir()
    out, data = folder / "s", Pictures()
    if begun:
        explain(out, methods=gradient, shard=(0, 2))
        out.chmod(0o555)
    folder.chmod(0o555)
    for parent in folder.parents[:3]:
        parent.chmod(0o755)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)  # to whom modes apply
        with pytest.raises(PermissionError, match=r"`out` '.*' cannot be written to: Permission denied"):
            explain(out, methods=gradient, data=data)
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
    assert data.asked == []  # before anything is explained


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_its_files_are_those_that_zarr_would_write(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("pullback.dataset._store.CHUNK", 4 * 3 * 8 * 8 * 4 * 2)  # bytes: so targets have chunks, too
    data = Pictures(broken=[*range(4), 6, 22])
    names = [f"ώ{i}" * (i % 3) for i in range(23)]
    store = explain(tmp_path / "ours", data=data, targets="top5", dtype=dtype, ids=names)
    assert store["gradient"].chunks[1] in (2, 4)  # of 5 targets: the last chunk is filled up
    copy = zarr.open_group(tmp_path / "theirs", mode="w")
    for name, array in store.arrays():
        other = copy.create_array(
            name,
            shape=array.shape,
            chunks=array.chunks,
            dtype=array.dtype,
            fill_value=array.fill_value,
            compressors=array.compressors,
            chunk_key_encoding={"name": "default", "separator": "."},
        )
        other[:] = array[:]
        ours, theirs = (
            {file.name: file.read_bytes() for file in (tmp_path / place / name).glob("c*")}
            for place in ("ours", "theirs")
        )
        assert ours == theirs, name
    assert not (tmp_path / "ours/gradient/c.0.0.0.0.0").exists()  # none of these examples could be read


@pytest.fixture
def small_disk(tmp_path):
    """A disk of half a megabyte, and a function that enlarges it."""

    def mount(*options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(tmp_path / "disk")]
        return subprocess.run(command, capture_output=True).returncode == 0

    (tmp_path / "disk").mkdir()
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or not mount("size=512k"):
        pytest.skip("only root of a Linux machine may mount a disk")
    try:
        yield tmp_path / "disk", lambda: mount("remount", "size=8m")
    finally:
        subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def test_a_disk_that_is_full(tmp_path, small_disk):
    disk, enlarge = small_disk
    whole = explain(tmp_path / "whole", data=Pictures(side=32))
    for _ in range(2):  # also where it is full from the start
        with pytest.raises(OSError, match=r"`out` '.*' cannot be written to: No space left on device") as told:
            explain(disk / "s", data=Pictures(side=32))
        assert told.value.errno == errno.ENOSPC
    done = int((open_store(disk / "s")["status"][:] == 1).sum())
    assert 0 < done < 23
    assert not list(disk.rglob("*partial*"))
    assert enlarge()
    data = Pictures(side=32)
    assert_same(explain(disk / "s", data=data), whole)
    assert data.asked == list(range(done, 23))


def test_a_file_that_cannot_be_written_whole(tmp_path, undisturbed):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))  # no file may be larger
    try:
        with pytest.raises(OSError, match=r"`out` '.*' cannot be written to: File too large"):
            explain(tmp_path / "s")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (open_store(tmp_path / "s")["status"][:] == 1).any()
    assert_same(explain(tmp_path / "s"), undisturbed)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the resident set from /proc")
def test_memory_does_not_grow_with_the_dataset(tmp_path):
    """2,000 examples have 300 MB of attributions here; held are those of a batch."""
    resident = []

    def measure(done, total):
        with open("/proc/self/statm") as file:
            resident.append(int(file.read().split()[1]) * resource.getpagesize())

    model = nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    explain(
        tmp_path / "s",
        data=Pictures(2000, side=80),
        model=model.eval(),
        methods=gradient,
        batch_size=20,
        progress=measure,
    )
    assert len(resident) == 102
    assert max(resident[21:]) - max(resident[:21]) < 8 * 2**20


def test_public_names():
    assert dataset.__all__ == ["Explainer", "explain_dataset", "open_store", "read"]
