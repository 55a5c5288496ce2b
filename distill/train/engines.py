"""How an optimizer step runs on the processes there are: one, several with a whole copy each, DeepSpeed ZeRO 1 to 3, or
FSDP2, as accelerate says.

All have one form of training state: every tensor whole, under the parameter's name. So a run that was saved by one of
them goes on under any other, and on another number of processes.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.distributed.fsdp import FSDPModule
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from ...students import Mixer
from ..errors import RunError
from ..run.files import one_line
from .compiled import Recorded, compiled
from .groups import ParameterGroup
from .protocols import Objective

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

ADAM = ("exp_avg", "exp_avg_sq")  # what AdamW keeps for each parameter, besides its count of steps
UNCOMPILABLE = (TorchDynamoException, FailOnRecompileLimitHit, GuardOnDataDependentSymNode)
BUCKET = 1 << 26  # numbers that go from process to process at a time


def make_engine(
    objective: Objective,
    groups: list[ParameterGroup],
    betas: list[float],
    clip: float,
    accumulation: int,
    accelerator: Accelerator,
    compile: bool = False,
    say: Callable[[str], None] = print,
) -> "Engine":
    """The engine for accelerate's kind of distribution.

    Args:
        objective: `forward(batch) -> (loss, {name: metric})`, the loss a mean over the batch.
        groups: what is trained, by AdamW; each with its weight decay.
        clip: the largest norm of the gradient of all of them.
        accumulation: forward passes whose gradients make up a step.
        compile: whether layers are compiled and, where each process has a whole copy on a GPU, passes are recorded as
            CUDA graphs.
        say: takes a line, where that turns out to be impossible.
    """
    kinds = {DistributedType.DEEPSPEED: DeepSpeedEngine, DistributedType.FSDP: FSDPEngine}
    kind = kinds.get(accelerator.distributed_type, Engine)
    return kind(objective, groups, betas, clip, accumulation, accelerator, compile, say)


def sharded(accelerator: Accelerator) -> tuple[str, ...]:
    """Of "parameters", "gradients" and "optimizer", what each process has only a shard of."""
    if accelerator.distributed_type == DistributedType.FSDP:
        return "parameters", "gradients", "optimizer"
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return ("optimizer", "gradients", "parameters")[: accelerator.state.deepspeed_plugin.zero_stage]
    return ()


class Engine:
    """One process, or several with a whole copy of everything each, which average their gradients before a step.

    Not by DistributedDataParallel, which sends gradients while others are still computed, but whose passes cannot be
    recorded as CUDA graphs: docs/results/training.md has both.
    """

    shards = False  # whether parameters are elsewhere than in the modules that were given

    def __init__(
        self,
        objective: Objective,
        groups: list[ParameterGroup],
        betas: list[float],
        clip: float,
        accumulation: int,
        accelerator: Accelerator,
        compile: bool,
        say: Callable[[str], None],
    ):
        self.accelerator, self.clip, self.accumulation, self._say = accelerator, clip, accumulation, say
        self.parameters = {name: p for group in groups for name, p in group["parameters"].items()}
        names = {id(p): name for name, p in objective.named_parameters()}
        self._names = {name: names[id(p)] for name, p in self.parameters.items()}  # ours -> the objective's
        self._passes = 0  # since the last step
        self._buckets = list(_buckets(self.parameters.values()))
        self._compiled = ExitStack()
        if compile and self._compiles():
            self._compiled.enter_context(compiled(objective))
        self.module, self.optimizer = self._prepare(objective, _adamw(groups, betas))
        self._recorded: Recorded | None = None
        if compile and self._records(objective):
            trained = list(self.parameters.values())
            self._recorded = Recorded(self._pass, trained, accumulation > 1, objective.kind, say)

    def forward_backward(self, batch: dict[str, Tensor], last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one micro-batch; its gradient is added. `last`: of those that make up a step.

        Where a pass fails for being compiled, or for the memory of recorded ones, it runs again without. Gradients that
        were there before it cannot be told from its own: the step is skipped then, as one that is not finite.
        """
        try:
            found = (self._pass if self._recorded is None else self._recorded)(batch)
        except UNCOMPILABLE as error:
            self._say(f"layers could not be compiled ({one_line(error)}): they run as they are")
            self.release()
            found = None
        except torch.OutOfMemoryError:
            if not self._recorded:
                raise
            self._say("the memory of recorded steps is needed: they are launched from Python")
            self._recorded = found = None
        if found is None:  # out of the handlers, whose tracebacks hold the memory of the pass
            torch.cuda.empty_cache()
            for parameter in self._trained():
                parameter.grad = None
            if self._passes:
                self._skip_step()
            found = self._pass(batch)
        self._passes += 1
        return found

    def _skip_step(self) -> None:
        """As for any gradient that is not finite: NaN reaches every process with the average, and all skip the step."""
        parameter = self._trained()[0]
        parameter.grad = torch.full_like(parameter, float("nan"))

    def _pass(self, batch):
        loss, metrics = self.module(batch)
        self._backward(loss / self.accumulation)
        # What keeps the graph of a pass alive ties parameters to the stream it ran on: no recording could follow.
        return loss.detach(), {name: value.detach() for name, value in metrics.items()}

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> tuple[Tensor, Tensor]:
        """An optimizer step with `lr` of every group's learning rate, skipped where the gradient is not finite.

        Returns:
            The gradient's norm before clipping, and whether the step was skipped: scalars, on the device.
        """
        self._passes = 0
        if self.accelerator.num_processes > 1:
            self._average()
        optimizer = self.optimizer.optimizer
        self._set_lr(lr)
        norm = nn.utils.clip_grad_norm_(self._trained(), self.clip)
        skipped = ~torch.isfinite(norm)
        optimizer.found_inf = skipped.float()  # the fused kernel looks at it, and the host need not wait
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm, skipped

    def state(self) -> dict[str, Tensor] | None:
        """The training state, whole: `parameter.NAME`, `optimizer.KEY.NAME`. Every process must call it; in the main
        one it returns tensors on the CPU, in the others None."""
        state: dict[str, Tensor] = {}
        for name, parameter in self._sharded().items():
            held = self.optimizer.optimizer.state[parameter]
            tensors = {f"parameter.{name}": parameter.detach()}
            tensors |= {f"optimizer.{key}.{name}": held[key] for key in (*ADAM, "step") if held}
            self._collect(state, {key: self._whole(value) for key, value in tensors.items()})
        return state if self.accelerator.is_main_process else None

    def load_optimizer(self, state: dict[str, Tensor]) -> None:
        """Takes the optimizer's part of a state. Parameters must have been loaded before the engine was made."""
        for name, parameter in self._sharded().items():
            if f"optimizer.step.{name}" in state:
                held = {key: self._share(state[f"optimizer.{key}.{name}"], parameter) for key in ADAM}
                step = state[f"optimizer.step.{name}"].clone().to(parameter.device)
                self.optimizer.optimizer.state[parameter] = {"step": step, **held}

    def release(self) -> None:
        """Lets go of what was compiled and recorded: layers are as they were."""
        self._recorded = None
        self._compiled.close()

    def close(self) -> None:
        """Lets go of the objective and the optimizer's state."""
        self.release()
        self.accelerator.free_memory()

    def _compiles(self) -> bool:
        return True

    def _records(self, objective: Objective) -> bool:
        if self.shards or self.accelerator.device.type != "cuda":
            return False
        # These look at the state of random generators, which a recording must not, or are fetched by the host.
        again = any(getattr(module, "gradient_checkpointing", False) for module in objective.modules())
        shared = any(isinstance(module, FSDPModule) for model in objective.models() for module in model.modules())
        for found, what in ((again, "layers that are computed again"), (shared, "layers that processes share")):
            if found:
                self._say(f"{what} cannot be recorded as CUDA graphs: passes are launched from Python")
        return not (again or shared)

    def _prepare(self, objective, optimizer):
        for parameter in self.parameters.values() if self.accelerator.num_processes > 1 else ():
            torch.distributed.broadcast(parameter.data, 0)
        return objective, self.accelerator.prepare(optimizer)

    def _average(self) -> None:
        """Gradients become their means over the processes, where any has one."""
        for bucket in self._buckets:
            has = torch.ones(len(bucket), device=self.accelerator.device)
            without = [place for place, parameter in enumerate(bucket) if parameter.grad is None]
            for place in without:
                has[place] = 0
            pieces = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket]
            flat = torch.cat([*pieces, has])
            torch.distributed.all_reduce(flat)
            flat /= self.accelerator.num_processes
            *means, has = flat.split([*(p.numel() for p in bucket), len(bucket)])
            for parameter, mean in zip(bucket, means, strict=True):
                parameter.grad = mean.view_as(parameter)
            held = has.tolist() if without else ()  # the host waits only where something is missing
            for place in without:
                if not held[place]:
                    bucket[place].grad = None

    def _set_lr(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["top_lr"] * factor

    def _sharded(self) -> dict[str, nn.Parameter]:
        """What the optimizer has under each of our names."""
        return self.parameters

    def _trained(self) -> list[nn.Parameter]:
        return list(self._sharded().values())

    def _collect(self, state: dict, tensors: dict[str, Tensor]) -> None:
        if self.accelerator.is_main_process:
            state |= {key: value.detach().to("cpu", copy=True) for key, value in tensors.items()}

    def _whole(self, tensor: Tensor) -> Tensor:
        return tensor

    def _share(self, tensor: Tensor, parameter: nn.Parameter) -> Tensor:
        """This process's part of a whole tensor."""
        return tensor.to(parameter.device, copy=True)


class FSDPEngine(Engine):
    """PyTorch's fully_shard: each process holds a share of every parameter, its gradient and optimizer state."""

    shards = True

    def _prepare(self, objective, optimizer):
        if any(module.in_common for module in objective.modules() if isinstance(module, Mixer)):
            raise RunError(
                "fully_shard cannot share projections between the layers that it shards: train on one process or with "
                "DeepSpeed, or leave student.attention_shared_rank and student.plan=zamba out"
            )
        # What is gathered together: a decoder layer, or, where they are trained alone, a mixer.
        layers = getattr(getattr(objective, "student", None), "_no_split_modules", None)
        mixers = {type(module).__name__ for module in objective.modules() if isinstance(module, Mixer)}
        # By an attribute of the objective the plugin would be told in the first stage only.
        self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = list(layers or mixers)
        return self.accelerator.prepare(objective, optimizer)

    def forward_backward(self, batch, last):
        self.module.set_requires_gradient_sync(last)
        return super().forward_backward(batch, last)

    def _backward(self, loss):
        with _no_way_back():  # parameters are where they were gathered
            loss.backward()

    def step(self, lr):
        self._passes = 0
        self._set_lr(lr)
        optimizer = self.optimizer.optimizer
        norm = cast("DTensor", nn.utils.clip_grad_norm_(self._trained(), self.clip)).full_tensor()
        skipped = ~torch.isfinite(norm)
        if not skipped:  # the fused kernel takes no flag beside sharded tensors
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm, skipped

    def _sharded(self):
        found = dict(self.module.named_parameters())
        return {ours: found[name] for ours, name in self._names.items()}

    def _whole(self, tensor):
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    def _share(self, tensor, parameter):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)


class DeepSpeedEngine(Engine):
    """ZeRO: optimizer state (1), gradients (2) and parameters (3) are sharded over the processes."""

    shards = True

    def _compiles(self):
        return self.accelerator.state.deepspeed_plugin.zero_stage < 3  # ZeRO 3 fetches parameters inside of layers

    def _prepare(self, objective, optimizer):
        plugin = self.accelerator.state.deepspeed_plugin
        config = plugin.deepspeed_config
        # Steps, clipping and precision are the trainer's; whatever a person's DeepSpeed config says of the rest holds.
        config["gradient_accumulation_steps"] = self.accelerator.gradient_accumulation_steps = self.accumulation
        config["train_micro_batch_size_per_gpu"] = 1  # sequences are counted by the trainer: it need only be a number
        config["gradient_clipping"] = self.clip
        config["train_batch_size"] = "auto"
        if plugin.zero_stage == 3:
            self._register_external(objective)
        else:  # what is compiled for the first layer of a kind takes its parameters' alignment for granted of all
            config["zero_optimization"]["parameter_alignment"] = True
        engine, _ = self.accelerator.prepare(objective, optimizer)
        self._base = engine.optimizer.optimizer
        # Their first step would make the state, and ZeRO 1 and 2 link it to parameters before all groups have one.
        parts = "fp32_partitioned_groups_flat" if plugin.zero_stage == 3 else "single_partition_of_fp32_groups"
        for flat in getattr(engine.optimizer, parts):
            step = torch.zeros((), device=flat.device)
            self._base.state[flat] = {"step": step, **{key: torch.zeros_like(flat) for key in ADAM}}
        if plugin.zero_stage < 3:
            engine.optimizer._lazy_init_hp_params_optimizer_state()
        return engine, engine.optimizer

    @staticmethod
    def _register_external(objective: Objective) -> None:
        """Parameters that are read elsewhere than in the forward pass of the module that has them."""
        from deepspeed.runtime.zero.partition_parameters import register_external_parameter

        for mixer in [module for module in objective.modules() if isinstance(module, Mixer)]:
            for held in [getattr(mixer, name) for name in mixer.apart]:
                for parameter in held.parameters() if held is not None else ():
                    register_external_parameter(mixer, parameter)
        if hasattr(objective, "student"):
            register_external_parameter(objective, objective.student.get_output_embeddings().weight)

    def forward_backward(self, batch, last):
        self.module.set_gradient_accumulation_boundary(last)
        return super().forward_backward(batch, last)

    def _backward(self, loss):
        with _no_way_back():  # gradients are on their way to other processes
            self.module.backward(loss, scale_wrt_gas=False)

    def step(self, lr):
        self._passes = 0
        self._set_lr(lr)
        self.module.step()  # leaves itself out where the gradient's norm is not finite
        skipped = bool(self.optimizer.overflow)
        norm = float("nan") if skipped else float(self.module.get_global_grad_norm())
        device = self.accelerator.device
        return torch.tensor(norm, device=device), torch.tensor(skipped, device=device)

    def state(self):
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        state: dict[str, Tensor] = {}
        step = next(iter(self._base.state.values()))["step"]
        for name, parameter in self.parameters.items():
            tensors = {f"parameter.{name}": safe_get_full_fp32_param(parameter)}
            tensors |= {f"optimizer.{key}.{name}": safe_get_full_optimizer_state(parameter, key) for key in ADAM}
            self._collect(state, {**tensors, f"optimizer.step.{name}": step})
        return state if self.accelerator.is_main_process else None

    def load_optimizer(self, state):
        from deepspeed.utils import safe_set_full_optimizer_state

        for name, parameter in self.parameters.items():
            if f"optimizer.step.{name}" in state:
                for key in ADAM:
                    value = state[f"optimizer.{key}.{name}"].to(self.accelerator.device)
                    safe_set_full_optimizer_state(parameter, value, key)
                for held in self._base.state.values():
                    held["step"].copy_(state[f"optimizer.step.{name}"])

    def close(self):
        self.module.destroy()
        super().close()


@contextmanager
def _no_way_back() -> Iterator[None]:
    """Of a backward pass that cannot run again: one that cannot be compiled stops the run."""
    try:
        yield
    except UNCOMPILABLE as error:
        raise RunError(f"layers could not be compiled ({one_line(error)}): set run.compile=false") from error


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters in order, as many at a time as have `BUCKET` numbers, or one that has more."""
    bucket: list[nn.Parameter] = []
    count = 0
    for parameter in parameters:
        if bucket and count + parameter.numel() > BUCKET:
            yield bucket
            bucket, count = [], 0
        bucket.append(parameter)
        count += parameter.numel()
    yield bucket


def _adamw(groups: list[ParameterGroup], betas: list[float]) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    out = []
    for group in groups:
        for decay, of_kind in ((group["weight_decay"], lambda p: p.ndim == 2), (0.0, lambda p: p.ndim != 2)):
            chosen = [p for p in group["parameters"].values() if of_kind(p)]
            if chosen:
                out.append({"params": chosen, "lr": group["lr"], "top_lr": group["lr"], "weight_decay": decay})
    return torch.optim.AdamW(out, betas=(betas[0], betas[1]), fused=True)
