"""Check and time one case: ours, and its peers."""

import re
import time

from .cases import Case
from .floors import BOTH, FORWARD, floor_ms
from .judge import OURS, check, relative
from .meter import Meter, Step, environment
from .peers import Call


def run_case(case: Case, meter: Meter, ceilings: dict[str, float], peers: str = ".*") -> list[dict]:
    """Check and time one case: ours and the peers whose names match. What fails is reported, ours too.

    Returns:
        A record for each of its passes.
    """
    inputs = case.make()
    errors, expected, first_call_s = _checked(case, inputs, meter)
    meter.free()
    sets = [inputs] + [case.make() for _ in range(meter.sets(inputs) - 1)]
    for tensors in sets:
        for name in case.leaves:
            tensors[name].requires_grad_()
    records = []
    for name, cost in case.costs.items():
        results = _run_pass(case, name == BOTH, sets, meter, peers, expected)
        if first_call_s is not None:  # the check was the first
            results[OURS]["first_call_s"] = first_call_s
        for kind, result in results.items():
            say(f"  {name:16s} {kind:18s} " + _describe(result))
        records.append(
            {
                "op": case.op,
                "shape": case.shape,
                "pass": name,
                "bytes": cost[0],
                "flops": cost[1],
                "floor_ms": floor_ms(cost, ceilings),
                "errors": {"y": errors["y"]} if name == FORWARD and "y" in errors else errors,
                "targets": case.targets.get(name, []),
                "results": results,
            }
        )
    return records


def say(text: str):
    print(text, flush=True)


def short(error: Exception) -> str:
    """One line of an exception, for a table."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = lines[0].replace("|", "/")
    return text if len(text) <= 120 else text[:117] + "..."


def _checked(case, inputs, meter):
    """The result of `check`; where it fails the reason is the only error, and the rest None."""
    start = time.perf_counter()
    try:
        errors, expected, first_call_s = check(case, inputs, meter)
    except Exception as error:
        say(f"  check failed: {short(error)}")
        return {"check": short(error)}, None, None
    say(f"  check {time.perf_counter() - start:.1f} s: " + ", ".join(f"{n} {e:.1e}" for n, e in errors.items()))
    return errors, expected, first_call_s


def _run_pass(case, backward, sets, meter, peers, expected):
    """The results of one pass, by implementation."""

    def ours(t):
        return Call(lambda: case.ours(**t))

    def error_of(call):
        y = case.cut(call.compare(call.run()))  # before other calls have changed the inputs
        return relative(y, expected)

    results, steps, graphs = {}, {}, {}
    bound = {OURS: ours} | {kind: peer for kind, peer in case.peers.items() if re.fullmatch(peers, kind)}
    for kind, bind in bound.items():
        known = expected is not None and kind != OURS
        results[kind], steps[kind], graph = _prepare(case, bind, sets, backward, meter, error_of if known else None)
        if graph:
            graphs[kind] = graph
        if steps[kind] and kind == OURS and meter.cuda:
            results[kind]["kernels"] = meter.kernels(steps[kind][0])
        meter.sync()  # a broken device shows here, and ends the run
        meter.free()
    _sample_in_turn(results, graphs, "graph", 30)
    graphs.clear()  # and the memory that they hold
    meter.free()
    _sample_in_turn(results, {kind: meter.eager(own) for kind, own in steps.items() if own}, "eager", 10)
    return results


def _prepare(case, bind, sets, backward, meter, error_of):
    """Run one implementation on each set of inputs, and capture it in a graph.

    Args:
        bind: inputs -> Call.
        error_of: Call -> relative error, or None.

    Returns:
        A result: first_call_s, error and peak_mb, as far as they could be had; `refuses` says why it does not run at
        all, `graph_refuses` why not in a graph. Its steps, none if it refuses. What samples its graph, or None.
    """
    result, graph = {}, None
    try:
        fresh = [{**t, **{n: t[n].clone() for n in case.mutated}} for t in sets]
        calls = [bind(t) for t in fresh]
        with environment(calls[0].env):
            start = time.perf_counter()
            if error_of and calls[0].compare:
                result["error"] = error_of(calls[0])
            leaves = [call.leaves or [t[n] for n in case.leaves] for t, call in zip(fresh, calls, strict=True)]
            steps = [Step(call.run, own, backward, call.env) for call, own in zip(calls, leaves, strict=True)]
            steps[0]()
            meter.sync()
            result["first_call_s"] = time.perf_counter() - start
            if meter.cuda:
                result["peak_mb"] = meter.peak_mb(steps[0])
                try:
                    graph = meter.graph(steps)
                except Exception as error:
                    result["graph_refuses"] = short(error)
            return result, steps, graph
    except ModuleNotFoundError as error:
        result["refuses"] = f"not installed ({error.name})"
    except Exception as error:
        result["refuses"] = short(error)
    return result, [], None


def _sample_in_turn(results, samplers, mode, rounds):
    """Add the median time in `mode` and its spread to the results of all implementations, sampled in turn.

    Clocks change with what the GPU did before, and a time from Python is as noisy as the machine is busy: what is
    compared has to meet the same of both.
    """
    for _ in range(rounds):
        for sampler in samplers.values():
            sampler.sample()
    for kind, sampler in samplers.items():
        results[kind][f"{mode}_ms"], results[kind][f"{mode}_spread"] = sampler.median()


def _describe(result):
    if "refuses" in result:
        return "refuses: " + result["refuses"]
    parts = [f"graph refuses: {result['graph_refuses']}"] if "graph_refuses" in result else []
    for mode in ("graph", "eager"):
        if f"{mode}_ms" in result:
            parts.append(f"{mode} {result[f'{mode}_ms']:8.3f} ms ±{100 * result[f'{mode}_spread']:.0f}%")
    if "peak_mb" in result:
        parts.append(f"{result['peak_mb']:6.0f} MB")
    parts.append(f"first call {result['first_call_s']:.1f} s")
    return "  ".join(parts + ([f"error {result['error']:.1e}"] if "error" in result else []))
