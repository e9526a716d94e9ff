"""What bfloat16 does to DPPO: its ratios, its gradients, its time and what it learns. Writes benchmarks/precision.json.

python scripts/precision.py runs/avoid-bc-0 runs/hopper-bc-0           # noise, gradients and CPU time, of a cloned policy each
python scripts/precision.py runs/avoid-bc-0 --seeds 6                  # what it learns in either precision: six runs each
python scripts/precision.py --compile                                  # what torch.compile brings
python scripts/results.py                                              # brings docs/performance.md up to date
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from bench_rows import ROOT, composed
from torch import Tensor, nn

from algos.dppo import DPPO, policy_loss, value_loss
from dprl import checkpoint, rng, setup
from dprl.compiling import compiled
from dprl.envs.collect import Collector
from dprl.evaluate import evaluate
from dprl.files import read_json, write_json
from dprl.lean import taken
from dprl.machine import machine
from dprl.networks.inputs import Observed
from dprl.precision import arithmetic
from dprl.timing import interleaved_seconds
from dprl.versions import versions

OUT = ROOT / "benchmarks" / "precision.json"
CPU = torch.device("cpu")
COMPILED = {"MLP, 256 wide": (), "MLP, 512 wide": ("width=512",), "U-Net, small": ("policy=unet_small",)}
FP32, BF16 = (arithmetic(name, CPU) for name in ("fp32", "bf16"))


def started(run: str, *overrides: str, seed: int = 0) -> tuple[Any, DPPO, Collector]:
    """DPPO from a cloned policy, by the task's settings, and what collects for it."""
    start = checkpoint.load(run)
    cfg = composed("finetune", (f"task={start.task}", "algo=dppo", "name=precision", *overrides))
    rng.seed(seed)
    envs = setup.environments(cfg, start.actor, num_envs=cfg.num_envs, seeded=False, reward=setup.reward(cfg))
    collector = Collector(envs, device=CPU)
    collector.reset(seed)
    return cfg, setup.construct(cfg.algo, "algo", policy=start.actor), collector


def gradient(module: nn.Module, loss: Tensor) -> Tensor:
    parameters = list(module.parameters())
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, parameters, materialize_grads=True)])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a, b, dim=0))


def numbers(log_ratio: Tensor, clip: Tensor) -> dict[str, Any]:
    """Of log-ratios [N, C] that are all 0 if computed exactly."""
    return {
        "rms": float(log_ratio.square().mean().sqrt()),
        "bias": float(log_ratio.mean()),
        "rms_by_step": log_ratio.square().mean(0).sqrt().tolist(),
        "clipped": float(((log_ratio.exp() - 1).abs() > clip).float().mean()),
        "exact": float((log_ratio == 0).float().mean()),
    }


class Probe:
    """A policy that DPPO has tuned for a few iterations in float32, with the data of the next one."""

    def __init__(self, run: str, iterations: int, settings: list[str]):
        self.cfg, self.algo, collector = started(run, *settings, "algo.precision=fp32", "algo.env_steps=1000000000")
        for _ in zip(range(iterations), self.algo.train(collector), strict=False):
            pass
        self.actor = self.algo.actor
        self.batch, _ = self.algo.advantages(collector(self.actor, self.algo.chunks))
        self.minibatches = [taken(self.batch, index) for index in torch.randperm(len(self.batch)).split(self.algo.batch)]
        self.rows = self.minibatches[0]
        collector.parts[0].close()

    def score(self, rows: Any, context: Any) -> Tensor:
        with context:
            return self.actor.score(rows["obs"], rows["chain"])

    def policy_gradient(self, rows: Any, context: Any, old: Tensor | None = None) -> Tensor:
        """Of the loss as the update has it; ``old`` log-probabilities None: its own, so that every ratio is 1."""
        logp, adv = self.score(rows, context), rows["adv"]
        adv = ((adv - adv.mean()) / (adv.std(correction=0) + 1e-8))[:, None] * self.algo.discount
        loss, _ = policy_loss(logp, logp.detach() if old is None else old, adv, self.algo.clip)
        return gradient(self.actor.tuned, loss)

    def rounded_gradient(self, rows: Any) -> Tensor:
        """As it would be in bfloat16 if observations were rounded too."""
        with mock.patch.object(Observed, "forward", nn.Linear.forward):
            return self.policy_gradient(rows, BF16)

    def critic_gradient(self, rows: Any, context: Any) -> Tensor:
        with context:
            value = self.algo.value(rows["obs"])
        return gradient(self.algo.critic, value_loss(value.float(), rows["value"], rows["target"], None))

    def ratios(self) -> dict[str, Any]:
        """Log-ratios before any update: drawn and scored in bf16, and drawn in float32 but scored in bf16."""
        with torch.no_grad():
            mixed = self.score(self.rows, BF16) - self.rows["logp"]
            with BF16:
                _, drawn = self.actor(self.rows["obs"][: self.cfg.num_envs])  # so many are drawn at a time
                same = self.actor.score(self.rows["obs"][: self.cfg.num_envs], drawn["chain"]) - drawn["logp"]
        return {"both": numbers(same, self.algo.clip), "scored": numbers(mixed, self.algo.clip)}

    def gradients(self) -> dict[str, float]:
        """Cosines with the gradient in float32 of the same minibatch; of another minibatch, to compare with. Means over
        minibatches."""
        found = []
        for rows, others in zip(self.minibatches, [*self.minibatches[1:], self.rows], strict=True):
            exact = self.policy_gradient(rows, FP32)
            found.append(
                {
                    "policy": cosine(exact, self.policy_gradient(rows, BF16)),
                    "policy_mixed": cosine(exact, self.policy_gradient(rows, BF16, rows["logp"])),
                    "policy_rounded": cosine(exact, self.rounded_gradient(rows)),
                    "another_minibatch": cosine(exact, self.policy_gradient(others, FP32)),
                    "critic": cosine(self.critic_gradient(rows, FP32), self.critic_gradient(rows, BF16)),
                }
            )
        return {name: sum(each[name] for each in found) / len(found) for name in found[0]}

    def seconds(self, repeats: int, least: float) -> dict[str, dict[str, float]]:
        """CPU time of a policy step without its optimizer's, and of a chunk for every environment."""

        def drawing(context: Any) -> Callable[[], Any]:
            def work() -> None:
                with torch.no_grad(), context:
                    self.actor(self.rows["obs"][: self.cfg.num_envs])

            return work

        works = {
            "update": [lambda c=context: self.policy_gradient(self.rows, c) for context in (FP32, BF16)],
            "critic": [lambda c=context: self.critic_gradient(self.rows, c) for context in (FP32, BF16)],
            "chunks": [drawing(context) for context in (FP32, BF16)],
        }
        return {
            name: dict(zip(("fp32", "bf16"), interleaved_seconds(pair, repeats=repeats, least=least, clock=time.process_time), strict=True))
            for name, pair in works.items()
        }

    def after(self) -> dict[str, float]:
        """Log-ratios once an iteration has been learned from, in bf16 beside the exact ones."""
        old = {name: self.score(self.rows, context).detach() for name, context in (("fp32", FP32), ("bf16", BF16))}
        self.algo.update(self.batch)
        moved = {name: self.score(self.rows, context).detach() - old[name] for name, context in (("fp32", FP32), ("bf16", BF16))}
        out = {"rms": moved["fp32"].square().mean().sqrt(), "error": (moved["bf16"] - moved["fp32"]).square().mean().sqrt()}
        out |= {f"clipped_{name}": ((ratio.exp() - 1).abs() > self.algo.clip).float().mean() for name, ratio in moved.items()}
        return {name: float(value) for name, value in out.items()}


def measured(run: str, options: argparse.Namespace) -> dict[str, Any]:
    """The entry of a task."""
    probe = Probe(run, options.iterations, options.settings)
    out: dict[str, Any] = {"weights": sum(p.numel() for p in probe.actor.tuned.parameters()), "states": len(probe.rows)}
    out |= {"clip": float(probe.algo.clip.min()), "ratios": probe.ratios(), "cosines": probe.gradients()}
    return out | {"seconds": probe.seconds(options.repeats, options.least), "after": probe.after()}


def learned(run: str, precision: str, seed: int, settings: list[str]) -> dict[str, Any]:
    """A run of DPPO: what the episodes that it trained on brought, and what it acts like at the end."""
    cfg, algo, collector = started(run, *settings, f"algo.precision={precision}", seed=seed)
    begun, curve = time.process_time(), []
    for _ in algo.train(collector):
        told = collector.metrics()
        curve.append(told.get("train/success", told["train/return"]))
    seconds = time.process_time() - begun
    collector.parts[0].close()
    envs = setup.environments(cfg, algo.actor.tuned, num_envs=cfg.evaluation.num_envs)
    score = evaluate(algo.actor, envs, range(cfg.evaluation.seed, cfg.evaluation.seed + cfg.evaluation.episodes)).score()
    envs.close()
    return {"precision": precision, "seed": seed, "env_steps": collector.env_steps, "seconds": seconds, "curve": curve, "score": score}


def compilation(label: str, precision: str, overrides: tuple[str, ...], options: argparse.Namespace) -> dict[str, Any]:
    """CPU time of a cloning step without its optimizer's, as it is and compiled, and of compiling it."""
    cfg = composed("pretrain", ("task=avoid", "policy.obs_shape=[20]", "policy.act_dim=2", *overrides))
    rng.seed(0)
    policy, context = setup.construct(cfg.policy, "policy").train(), arithmetic(precision, CPU)
    obs, act = torch.randn(cfg.train.batch, policy.obs_steps, 20), torch.rand(cfg.train.batch, policy.horizon, 2)
    mask = torch.ones(act.shape[:2], dtype=torch.bool)

    def work(call: Any) -> None:
        policy.denoiser._compiled_call_impl = call
        with context:
            loss = policy.loss(obs, act, mask)
        gradient(policy, loss)

    work(None)
    begun = spent()
    compiled(policy)
    call = policy.denoiser._compiled_call_impl
    work(call)
    out = {"policy": label, "precision": precision, "compiling": spent() - begun}
    pair = [lambda: work(None), lambda: work(call)]
    plain, faster = interleaved_seconds(pair, repeats=options.repeats, least=options.least, clock=time.process_time)
    return out | {"plain": plain, "compiled": faster}


def spent() -> float:
    """CPU time of this process and of those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="of pretrain.py, a task each")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too, on new policies")
    parser.add_argument("--seeds", type=int, default=0, help="measure learning instead, by so many runs in each precision")
    parser.add_argument("--settings", nargs="+", default=["algo.env_steps=130000"], help="of finetune.py")
    parser.add_argument("--iterations", type=int, default=3, help="of DPPO in float32 before gradients are compared")
    parser.add_argument("--repeats", type=int, default=5, help="timings; the median counts")
    parser.add_argument("--least", type=float, default=0.1, help="seconds of a timing")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)  # CPU time counts
    result = (
        read_json(options.out) if options.out.is_file() else {"machine": machine() | {"threads": 1}, "versions": versions(), "tasks": {}}
    )
    if options.compile:
        result["compile"] = []
    for label, overrides in COMPILED.items() if options.compile else ():
        for precision in ("fp32", "bf16"):
            result["compile"].append(compilation(label, precision, overrides, options))
            write_json(options.out, result)
            print(result["compile"][-1], flush=True)
    for run in options.runs:
        entry = result["tasks"].setdefault(checkpoint.load(run).task, {})
        if not options.seeds:
            entry |= measured(run, options)
            write_json(options.out, result)
        for seed in range(options.seeds):
            for precision in ("fp32", "bf16"):
                done = entry.setdefault("learning", [])
                if any((each["precision"], each["seed"]) == (precision, seed) for each in done):
                    continue  # goes on where it was cut off
                done.append(learned(run, precision, seed, options.settings))
                write_json(options.out, result)
                print({key: value for key, value in done[-1].items() if key != "curve"}, flush=True)


if __name__ == "__main__":
    main()
