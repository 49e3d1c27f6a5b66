"""The facade: what it decides, what it refuses, and a run of one process."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

from torchweft import Fabric, is_wrapped
from torchweft.api import Strategy
from torchweft.errors import InvalidRequest, Misuse, UnknownName


class Lame(Strategy):
    """Cannot do what its ``cannot`` says."""

    name = "lame"
    processes = "one"

    def __init__(self, **cannot: str) -> None:
        self.cannot = cannot


@pytest.fixture
def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


@pytest.fixture
def pair() -> Fabric:
    """Two processes, of which none is started."""
    return Fabric(accelerator="cpu", devices=2, strategy="ddp")


def net() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(2, 2)


def set_up(fabric: Fabric) -> tuple[Any, Any]:
    model = net()
    made: tuple[Any, Any] = fabric.setup(model, SGD(model.parameters(), lr=0.1))
    return made


# -- the promised names --------------------------------------------------------------------------


def test_arguments_are_the_promised_ones_and_have_names() -> None:
    parameters = inspect.signature(Fabric).parameters
    assert list(parameters) == [
        "accelerator",
        "strategy",
        "devices",
        "num_nodes",
        "precision",
        "launcher",
        "plugins",
        "callbacks",
        "loggers",
    ]
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values())


def test_methods_and_properties_are_the_promised_ones() -> None:
    methods = """launch setup setup_module setup_optimizers setup_dataloaders backward
        clip_gradients no_backward_sync autocast to_device print barrier broadcast all_gather
        all_reduce rank_zero_first save load load_raw seed_everything init_module init_tensor call
        log log_dict"""
    for name in methods.split():
        assert callable(getattr(Fabric, name)), name
        assert inspect.getdoc(getattr(Fabric, name)), name
    properties = """device global_rank local_rank node_rank world_size num_replicas
        is_global_zero strategy accelerator plan precision callbacks loggers logger"""
    for name in properties.split():
        assert isinstance(inspect.getattr_static(Fabric, name), property), name
        assert inspect.getdoc(inspect.getattr_static(Fabric, name)), name


def test_one_process_knows_where_it_is(fabric: Fabric) -> None:
    fabric.launch()
    where = (fabric.global_rank, fabric.local_rank, fabric.node_rank)
    assert where == (0, 0, 0)
    assert (fabric.world_size, fabric.num_replicas, fabric.is_global_zero) == (1, 1, True)
    assert fabric.device == torch.device("cpu")
    assert fabric.accelerator.backend == "gloo"
    assert fabric.strategy.place.plan is fabric.plan
    assert fabric.plan.summary().startswith("single_device on 1 x cpu, 32-true")


def test_before_launch_this_process_is_rank_zero(pair: Fabric) -> None:
    where = (pair.global_rank, pair.local_rank, pair.node_rank, pair.is_global_zero)
    assert where == (0, 0, 0, True)
    assert pair.world_size == 2


def test_a_pickled_fabric_has_the_same_plan(pair: Fabric) -> None:
    pair.seed_everything(5)
    read = pickle.loads(pickle.dumps(pair))
    assert read.plan == pair.plan
    assert read._seed == 5
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    fresh = pickle.loads(pickle.dumps(fabric))
    assert fresh.setup(net()).module.in_features == 2


def test_a_flag_that_means_the_same_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHWEFT_LAUNCHER", "fork")
    assert Fabric(accelerator="cpu", strategy="ddp", devices=2).plan.launcher.name == "fork"
    assert Fabric(accelerator="cpu", launcher="fork").plan.launcher.name == "fork"
    with pytest.raises(InvalidRequest, match="TORCHWEFT_LAUNCHER says 'fork'"):
        Fabric(accelerator="cpu", launcher="spawn")


# -- launch --------------------------------------------------------------------------------------


def test_launching_twice_is_an_error(fabric: Fabric) -> None:
    fabric.launch()
    with pytest.raises(
        Misuse,
        match=r"^fabric.launch\(\) was called twice; remove the second call, this process is "
        r"already rank 0 of 1$",
    ):
        fabric.launch()


def test_a_run_of_one_process_starts_by_itself_and_may_be_launched_all_the_same(
    fabric: Fabric,
) -> None:
    set_up(fabric)
    fabric.launch()
    with pytest.raises(Misuse, match="twice"):
        fabric.launch()


def test_a_function_is_called_with_the_fabric_and_its_result_comes_back(fabric: Fabric) -> None:
    def train(given: Fabric, first: int, *, second: int) -> Any:
        assert given is fabric
        model, _ = set_up(given)
        with pytest.raises(Misuse, match=r"launch\(\) was called twice"):
            given.launch()
        return model(torch.ones(1, 2)).shape, first + second

    assert fabric.launch(train, 1, second=2) == ((1, 2), 3)
    assert fabric.launch(train, 1, second=3) == ((1, 2), 4)
    fabric.launch()


def test_an_exception_of_the_function_passes_through(fabric: Fabric) -> None:
    def fail(given: Fabric) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fabric.launch(fail)
    fabric.launch()


@pytest.mark.parametrize("value", [3, "train", [print]])
def test_only_a_function_can_be_launched(pair: Fabric, value: Any) -> None:
    with pytest.raises(
        InvalidRequest,
        match=rf"was given a {type(value).__name__}; it takes a function, whose first argument is "
        r"the Fabric$",
    ):
        pair.launch(value)


def test_a_function_that_takes_nothing_is_an_error(pair: Fabric) -> None:
    def train() -> None: ...

    with pytest.raises(
        InvalidRequest,
        match=r"^fabric.launch\(train\) calls the function with the Fabric as its first argument, "
        r"and it takes none; write def train\(fabric\): …$",
    ):
        pair.launch(train)


def test_arguments_that_do_not_fit_are_an_error_before_any_process_starts(pair: Fabric) -> None:
    def train(fabric: Any, epochs: int) -> None: ...

    with pytest.raises(
        InvalidRequest,
        match=r"cannot call train\(.*epochs.*\).* missing a required argument: 'epochs'",
    ):
        pair.launch(train)
    with pytest.raises(InvalidRequest, match="unexpected keyword argument 'epoch'"):
        pair.launch(train, 3, epoch=3)


def test_arguments_without_a_function_are_an_error(fabric: Fabric) -> None:
    with pytest.raises(
        InvalidRequest, match=r"was given arguments without a function to pass them to"
    ):
        fabric.launch(epochs=3)


@pytest.mark.parametrize(
    "use",
    [
        lambda fabric: fabric.setup(net()),
        lambda fabric: fabric.setup_module(net()),
        lambda fabric: fabric.setup_optimizers(SGD(net().parameters(), lr=0.1)),
        lambda fabric: fabric.setup_dataloaders(DataLoader([1])),
        lambda fabric: fabric.backward(torch.ones(1)),
        lambda fabric: fabric.barrier(),
        lambda fabric: fabric.broadcast(1),
        lambda fabric: fabric.all_gather(1),
        lambda fabric: fabric.all_reduce(1),
        lambda fabric: fabric.to_device(torch.ones(1)),
        lambda fabric: fabric.device,
        lambda fabric: fabric.num_replicas,
        lambda fabric: fabric.rank_zero_first().__enter__(),
        lambda fabric: fabric.init_module(),
        lambda fabric: fabric.autocast(),
        lambda fabric: fabric.save("x.ckpt", {}),
        lambda fabric: fabric.load("x.ckpt"),
    ],
)
def test_several_processes_have_to_be_launched_first(pair: Fabric, use: Any) -> None:
    with pytest.raises(
        Misuse,
        match=r"^fabric.[a-z_]+(\(\))? came before fabric.launch\(\), and the plan has 2 processes "
        r"\(ddp on 2 x cpu, 32-true, launched by script\); call fabric.launch\(\) right after "
        r"Fabric\(...\)$",
    ):
        use(pair)


def test_where_a_function_must_be_launched_the_message_says_so() -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp_spawn")
    with pytest.raises(Misuse, match=r"call fabric.launch\(function\) and do this in the function"):
        fabric.setup(net())


# -- setup ---------------------------------------------------------------------------------------


def test_what_was_given_comes_back_in_the_same_order(fabric: Fabric) -> None:
    assert is_wrapped(fabric.setup(net()))
    assert is_wrapped(fabric.setup_module(net()))
    model = net()
    one, two = SGD([model.weight], lr=0.1), SGD([model.bias], lr=0.1)
    scheduler = StepLR(one, 1)
    ready = fabric.setup(model, one, two, scheduler=scheduler)
    assert [ready[0].module, ready[1].optimizer, ready[2].optimizer] == [model, one, two]
    assert ready[3] is scheduler
    alone = net()
    assert fabric.setup(alone, scheduler=scheduler)[1] is scheduler


def test_apart_is_as_well(fabric: Fabric) -> None:
    original = net()
    one, two = SGD([original.weight], lr=0.1), SGD([original.bias], lr=0.1)
    model = fabric.setup_module(original)
    ready = fabric.setup_optimizers(one, two)
    assert [optimizer.optimizer for optimizer in ready] == [one, two]
    assert ready[0].modules == [model.prepared]
    with pytest.raises(InvalidRequest, match="called without an optimizer"):
        fabric.setup_optimizers()


def test_the_loop_is_that_of_plain_torch(fabric: Fabric) -> None:
    plain = net()
    plain_optimizer = SGD(plain.parameters(), lr=0.1)
    model, optimizer = set_up(fabric)
    data = DataLoader(TensorDataset(torch.randn(8, 2), torch.randn(8, 2)), batch_size=4)
    loader = fabric.setup_dataloaders(data)
    for input, target in data:
        plain_optimizer.zero_grad()
        nn.functional.mse_loss(plain(input), target).backward()
        plain_optimizer.step()
    for input, target in loader:
        optimizer.zero_grad()
        fabric.backward(nn.functional.mse_loss(model(input), target))
        optimizer.step()
    assert torch.equal(model.weight, plain.weight)


@pytest.mark.parametrize("original", [True, False])
def test_a_model_is_set_up_once(fabric: Fabric, original: bool) -> None:
    module = net()
    model = fabric.setup(module)
    for method in (fabric.setup, fabric.setup_module):
        with pytest.raises(
            Misuse,
            match=r"was already set up; use what fabric.setup\(\) returned, and set every model "
            r"up once$",
        ):
            method(module if original else model)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (SGD(net().parameters(), lr=0.1), "a SGD"),
        (net().parameters(), "a generator"),
        (nn.Linear, "the class Linear"),
        (None, "a NoneType"),
    ],
)
def test_what_is_no_model_is_an_error(fabric: Fabric, given: Any, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        fabric.setup(given, net())
    assert str(caught.value) == (
        f"fabric.setup() was given {words} where the model belongs; write "
        "fabric.setup(model, optimizer)"
    )


@pytest.mark.parametrize("wrong", ["list", "scheduler", "model"])
def test_what_is_no_optimizer_is_an_error(fabric: Fabric, wrong: str) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    given = {"list": [optimizer], "scheduler": StepLR(optimizer, 1), "model": net()}[wrong]
    with pytest.raises(
        InvalidRequest,
        match=rf"was given a {type(given).__name__} where an optimizer belongs; optimizers are "
        r"passed one by one, and a scheduler as scheduler=$",
    ):
        fabric.setup(model, given)
    # Nothing was done to the others.
    fabric.setup(model, optimizer)


def test_a_loader_is_set_up_once(fabric: Fabric) -> None:
    loader = fabric.setup_dataloaders(DataLoader([1]))
    with pytest.raises(Misuse, match="already set up"):
        fabric.setup_dataloaders(loader)
    with pytest.raises(InvalidRequest, match="called without a loader"):
        fabric.setup_dataloaders()
    assert len(fabric.setup_dataloaders(DataLoader([1]), DataLoader([2]))) == 2


@pytest.mark.parametrize(
    ("capability", "use", "words"),
    [
        (
            "setup_apart",
            lambda fabric: fabric.setup_module(net()),
            r"cannot set up a model and its optimizer apart: so it is; use fabric.setup\(model",
        ),
        (
            "setup_apart",
            lambda fabric: fabric.setup_optimizers(SGD(net().parameters(), lr=0.1)),
            r"cannot set up a model and its optimizer apart: so it is; use fabric.setup\(model",
        ),
        (
            "several_modules",
            lambda fabric: [fabric.setup(net()), fabric.setup(net())],
            r"cannot set up a second model: so it is",
        ),
        (
            "clip_by_value",
            lambda fabric: fabric.clip_gradients(*set_up(fabric), clip_val=1.0),
            r"cannot clip gradients by value \(clip_val\): so it is",
        ),
        (
            "no_backward_sync",
            lambda fabric: fabric.no_backward_sync(fabric.setup(net())),
            r"cannot leave out the synchronisation of gradients: so it is",
        ),
    ],
)
def test_what_a_strategy_cannot_do_is_refused_with_its_reason(
    capability: str, use: Any, words: str
) -> None:
    fabric = Fabric(accelerator="cpu", strategy=Lame(**{capability: "so it is"}))
    kept: list[Any] = []
    with pytest.raises(Misuse, match=f"^strategy 'lame' {words}"):
        kept.append(use(fabric))


def test_modules_stay_where_they_are_if_asked() -> None:
    module = net().to("meta")
    fabric = Fabric(accelerator="cpu", devices=1)
    assert fabric.setup(module, move_to_device=False).weight.is_meta


# -- the step ------------------------------------------------------------------------------------


def test_backward_takes_the_arguments_of_torchs(fabric: Fabric) -> None:
    model, _ = set_up(fabric)
    output = model(torch.ones(1, 2))
    fabric.backward(output, torch.ones(1, 2), retain_graph=True)
    fabric.backward(output, gradient=torch.ones(1, 2), model=model)
    assert torch.equal(model.bias.grad, torch.full((2,), 2.0))
    engine = Fabric(accelerator="cpu", strategy=Lame(), precision="16-mixed")
    with pytest.raises(Misuse, match=r"fabric.backward\(model=\) was given a Linear that was not"):
        engine.backward(torch.ones(1, requires_grad=True), model=net())


def gradients(fabric: Fabric) -> tuple[Any, Any]:
    model, optimizer = set_up(fabric)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    return model, optimizer


def test_gradients_are_clipped_by_norm(fabric: Fabric) -> None:
    model, optimizer = gradients(fabric)
    norm = fabric.clip_gradients(model, optimizer, max_norm=1.0)
    assert norm is not None
    assert torch.isclose(norm, torch.tensor(24.0).sqrt())
    total = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert torch.isclose(total, torch.tensor(1.0), atol=1e-4)
    assert torch.isclose(
        fabric.clip_gradients(model, optimizer, max_norm=9, norm_type=float("inf")),  # type: ignore[arg-type]
        torch.tensor(2.0 / 24**0.5),
        atol=1e-4,
    )


def test_gradients_are_clipped_by_value(fabric: Fabric) -> None:
    model, optimizer = gradients(fabric)
    assert fabric.clip_gradients(model, optimizer, clip_val=0.5) is None
    assert torch.equal(model.bias.grad, torch.full((2,), 0.5))


@pytest.mark.parametrize("both", [{}, {"clip_val": 1.0, "max_norm": 2.0}])
def test_gradients_are_clipped_in_one_way(fabric: Fabric, both: Mapping[str, float]) -> None:
    model, optimizer = set_up(fabric)
    with pytest.raises(
        InvalidRequest,
        match=r"give one of the two, clip_val to clip by value or max_norm to clip by the global "
        r"norm$",
    ):
        fabric.clip_gradients(model, optimizer, **both)


def test_only_what_was_set_up_can_be_clipped(fabric: Fabric) -> None:
    model, optimizer = set_up(fabric)
    for given in ((model.module, optimizer), (model, optimizer.optimizer)):
        with pytest.raises(
            Misuse,
            match=r"fabric.clip_gradients\(\) was given a (Linear|SGD) that was not set up; pass "
            r"what fabric.setup\(\) returned$",
        ):
            fabric.clip_gradients(*given, max_norm=1.0)


def test_gradients_that_are_not_finite_are_an_error_on_the_host_unless_asked(
    fabric: Fabric,
) -> None:
    model, optimizer = gradients(fabric)
    model.bias.grad[0] = float("inf")
    with pytest.raises(RuntimeError, match="non-finite"):
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
    norm = fabric.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=False)
    assert norm is not None
    assert norm.isinf()


def test_accumulation_alone_changes_nothing(fabric: Fabric) -> None:
    model, _ = set_up(fabric)
    with fabric.no_backward_sync(model):
        fabric.backward(model(torch.ones(1, 2)).sum())
    with fabric.no_backward_sync(model, enabled=False):
        fabric.backward(model(torch.ones(1, 2)).sum())
    assert torch.equal(model.bias.grad, torch.full((2,), 2.0))
    with pytest.raises(Misuse, match=r"fabric.no_backward_sync\(\) was given a Linear"):
        fabric.no_backward_sync(model.module)


# -- tools ---------------------------------------------------------------------------------------


class Movable:
    """Something with a way of its own to move."""

    def to(self, device: torch.device) -> str:
        return f"on {device}"


def test_anything_can_be_brought_to_the_device(fabric: Fabric) -> None:
    module, tensor = net(), torch.ones(1)
    assert fabric.to_device(module) is module
    assert fabric.to_device(tensor) is tensor
    moved = fabric.to_device({"a": [tensor, Movable()], "b": "text", "c": 3})
    assert moved == {"a": [tensor, "on cpu"], "b": "text", "c": 3}


def test_printing(fabric: Fabric, capsys: pytest.CaptureFixture[str]) -> None:
    fabric.print("one", 2, sep="-", end="!")
    assert capsys.readouterr().out == "one-2!"


def test_alone_collectives_give_back_what_they_are_given(fabric: Fabric) -> None:
    tensor = torch.tensor([1.0, 2.0])
    assert fabric.broadcast(tensor) is tensor
    assert fabric.broadcast({"any": object}) == {"any": object}
    assert torch.equal(fabric.all_gather(tensor), tensor)
    assert fabric.all_gather({"a": [1, 2.5]}) == {"a": [torch.tensor(1), torch.tensor(2.5)]}
    assert fabric.all_reduce(tensor) is tensor
    assert fabric.all_reduce((3, True), reduce_op="sum") == (torch.tensor(3), torch.tensor(1))
    fabric.barrier("here")
    with fabric.rank_zero_first(), fabric.rank_zero_first(local=True):
        pass
    with pytest.raises(KeyError), fabric.rank_zero_first():
        raise KeyError


def test_alone_the_gradient_flows_through_a_gather(fabric: Fabric) -> None:
    tensor = torch.ones(2, requires_grad=True)
    assert not fabric.all_gather(tensor).requires_grad
    fabric.all_gather(tensor, sync_grads=True).sum().backward()
    assert torch.equal(tensor.grad, torch.ones(2))  # type: ignore[arg-type]


def test_collectives_refuse_what_they_cannot_do(fabric: Fabric) -> None:
    with pytest.raises(
        InvalidRequest,
        match=r"^reduce_op='median' is not known; it takes one of mean, sum, min, max, product$",
    ):
        fabric.all_reduce(1, reduce_op="median")
    with pytest.raises(
        InvalidRequest, match=r"^broadcast from src=1, but the ranks of this run are 0 to 0$"
    ):
        fabric.broadcast(1, src=1)
    for method in (fabric.all_gather, fabric.all_reduce):
        with pytest.raises(
            InvalidRequest, match=r"was given a str; it takes tensors, numbers, arrays and"
        ):
            method({"a": "text"})


def test_modules_may_be_made_without_being_filled(fabric: Fabric) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with fabric.init_module(empty_init=True):
        module = nn.TransformerEncoderLayer(8, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert module.linear1.weight.requires_grad
    with fabric.init_module():
        nn.Linear(2, 2)
    assert not torch.equal(torch.get_rng_state(), before)


# -- checkpoints ---------------------------------------------------------------------------------


def test_what_was_saved_is_loaded(fabric: Fabric, tmp_path: Path) -> None:
    model, optimizer = set_up(fabric)
    path = tmp_path / "x.ckpt"
    fabric.save(path, {"model": model, "optimizer": optimizer, "step": 3})
    expected = model.weight.detach().clone()
    nn.init.zeros_(model.weight)
    assert fabric.load(path, {"model": model, "optimizer": optimizer}) == {"step": 3}
    assert torch.equal(model.weight, expected)


def test_the_order_of_an_older_api_is_named(fabric: Fabric, tmp_path: Path) -> None:
    model, _ = set_up(fabric)
    with pytest.raises(
        InvalidRequest,
        match=r"^fabric.save\(state, path\) is the order of an older API; write "
        r"fabric.save\(path, state\)$",
    ):
        fabric.save({"model": model}, tmp_path / "x.ckpt")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


# -- callbacks and loggers -----------------------------------------------------------------------


class Callback:
    """Notes what it is told."""

    on_text = "no method"

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def on_step(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append((args, kwargs))


class Logger:
    """Notes what it is given."""

    def __init__(self) -> None:
        self.rows: list[Any] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.rows.append((dict(metrics), step))


def test_callbacks_are_called_by_the_name_of_the_method() -> None:
    one, two = Callback(), Callback()
    fabric = Fabric(accelerator="cpu", callbacks=[one, object(), two])
    fabric.call("on_step", 1, loss=2)
    fabric.call("on_nothing")
    assert one.calls == two.calls == [((1,), {"loss": 2})]
    assert len(fabric.callbacks) == 3
    with pytest.raises(InvalidRequest, match=r"attribute 'on_text' of Callback is a str, not a"):
        fabric.call("on_text")
    assert Fabric(accelerator="cpu", callbacks=one).callbacks == [one]


def test_loggers_are_given_plain_numbers() -> None:
    one, two = Logger(), Logger()
    fabric = Fabric(accelerator="cpu", loggers=[one, two])
    assert fabric.logger is one
    assert fabric.loggers == [one, two]
    fabric.log("loss", torch.tensor([2.5], requires_grad=True), step=1)
    fabric.log_dict({"a": 1, "b": torch.tensor(2)})
    assert one.rows == two.rows == [({"loss": 2.5}, 1), ({"a": 1, "b": 2}, None)]
    assert type(one.rows[0][0]["loss"]) is float
    with pytest.raises(
        InvalidRequest, match=r"the metric 'x' is a tensor of shape \(2,\), and loggers take single"
    ):
        fabric.log("x", torch.ones(2))


def test_without_loggers_there_is_none(fabric: Fabric) -> None:
    fabric.log("loss", 1.0)
    with pytest.raises(
        Misuse, match=r"fabric.logger was read, but Fabric\(loggers=...\) was given"
    ):
        _ = fabric.logger


# -- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["accelerator", "strategy", "precision", "launcher"])
def test_unknown_names_are_errors_with_the_nearest_known_one(kind: str) -> None:
    near = {"accelerator": "cpu", "strategy": "ddp", "precision": "64-true", "launcher": "spawn"}
    wrong: dict[str, Any] = {"accelerator": "cpu", kind: near[kind] + "x"}
    with pytest.raises(UnknownName, match=rf"did you mean '{near[kind]}'\?"):
        Fabric(**wrong)


def test_a_step_of_the_guarded_kind_needs_the_fabric(fabric: Fabric) -> None:
    engine = Fabric(accelerator="cpu", devices=1, precision="16-mixed")
    model, optimizer = set_up(engine)
    data = torch.ones(1, 2)
    with pytest.raises(
        Misuse,
        match=r"^loss.backward\(\) was called, but precision '16-mixed', which scales the loss, "
        r"needs fabric.backward\(loss\) in its place; change that line$",
    ):
        model(data).sum().backward()
    optimizer.zero_grad()
    engine.backward(model(data).sum())
    optimizer.step()
    # Where it is not needed it is not asked for.
    plain, _ = set_up(fabric)
    loss: Tensor = plain(data).sum()
    loss.backward()


def test_callbacks_hear_of_setups_and_steps() -> None:
    heard: list[Any] = []

    class Listener:
        def on_after_setup(self, fabric: Any, module: Any) -> None:
            heard.append(("setup", fabric, module))

        def on_after_optimizer_step(self, optimizer: Any) -> None:
            heard.append(("step", optimizer))

    fabric = Fabric(accelerator="cpu", callbacks=[Listener(), object()])
    net = nn.Linear(2, 1)
    plain = SGD(net.parameters(), lr=0.1)
    model, optimizer = fabric.setup(net, plain)
    optimizer.step()
    copied = copy.deepcopy(optimizer)
    assert copied.step(lambda: 3) == 3
    second = fabric.setup_module(nn.Linear(1, 1))
    assert heard == [
        ("setup", fabric, model),
        ("step", plain),
        ("step", copied.optimizer),
        ("setup", fabric, second),
    ]


def test_a_loop_is_tracked(capfd: pytest.CaptureFixture[str]) -> None:
    fabric = Fabric(accelerator="cpu")
    assert list(fabric.track(range(3), "counting")) == [0, 1, 2]
    assert "counting" in capfd.readouterr().err
