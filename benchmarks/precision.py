"""Measure the effect of bfloat16 on DPPO (ratios, gradients, time, learning), and of torch.compile on cloning.

Results are added to benchmarks/results/precision.json.

python -m benchmarks.precision runs/avoid-bc-0 runs/hopper-bc-0   # ratios, gradients and CPU time
python -m benchmarks.precision runs/avoid-bc-0 --seeds 6          # learning: six runs in each precision
python -m benchmarks.precision --compile                          # gain and cost of torch.compile

Shapes: N states, K' fine-tuned denoising steps.
"""

import argparse
import copy
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from algos.dppo import DPPO
from benchmarks.cases import ROOT, compose
from benchmarks.timing import interleaved_seconds
from dprl.learning.advantages import chunk_advantages
from dprl.learning.ppo import ppo_loss, value_loss
from dprl.networks.embeddings import ObsLinear
from dprl.rollout.collector import Collector
from dprl.rollout.evaluation import evaluate
from dprl.training import checkpoint, factory
from dprl.utils import seeding
from dprl.utils.device import autocast, compile_denoiser
from dprl.utils.files import read_json, write_json
from dprl.utils.system import machine, versions

OUT = ROOT / "benchmarks" / "results" / "precision.json"
CPU = torch.device("cpu")
COMPILED = {"MLP, 256 wide": (), "MLP, 512 wide": ("hidden_dim=512",), "U-Net, small": ("policy=unet_small",)}
PRECISIONS = ("fp32", "bf16")
FP32, BF16 = (autocast(name, CPU) for name in PRECISIONS)


def make_dppo(run: str, *overrides: str, seed: int = 0) -> tuple[Any, DPPO, Collector]:
    """Return config, algorithm and collector of DPPO from the cloned policy of a run, with its task's settings."""
    start = checkpoint.load(run)
    cfg = compose("finetune", (f"task={start.task}", "algo=dppo", "name=precision", *overrides))
    seeding.seed(seed)
    envs = factory.environments(cfg, start.actor, num_envs=cfg.num_envs, seeded=False, reward=factory.reward(cfg))
    collector = Collector(envs, device=CPU)
    collector.reset(seed)
    return cfg, factory.construct(cfg.algo, "algo", policy=start.actor), collector


class Probe:
    """A policy that DPPO has fine-tuned for a few iterations in float32, with the data of the next iteration.

    Args:
        run: folder of a run of pretrain.py.
        iterations: of DPPO, before anything is measured.
        settings: overrides of finetune.py.
    """

    def __init__(self, run: str, iterations: int, settings: list[str]):
        self.cfg, self.algo, collector = make_dppo(run, *settings, "algo.precision=fp32", "algo.env_steps=1000000000")
        for _ in zip(range(iterations), self.algo.iterations(collector), strict=False):
            pass
        self.actor, algo_cfg = self.algo.actor, self.algo.cfg
        rollout = collector(self.actor, algo_cfg.chunks)
        self.batch, _ = chunk_advantages(rollout, self.algo.value, algo_cfg, self.algo.return_scale)
        order = torch.randperm(len(self.batch))
        self.minibatches: list[Any] = [self.batch[index] for index in order.split(algo_cfg.batch_size)]
        self.rows: Any = self.minibatches[0]
        collector.parts[0].close()

    def log_prob(self, rows: Any, context: Any) -> Tensor:
        """Return log-probabilities [N, K'] of a minibatch's chains."""
        self.actor.autocast = context
        return self.actor.log_prob(rows["obs"], rows["chain"])

    def policy_gradient(self, rows: Any, context: Any, old_log_prob: Tensor | None = None) -> Tensor:
        """Return the flat gradient of DPPO's policy loss on a minibatch.

        Args:
            rows: minibatch.
            context: precision of the forward pass.
            old_log_prob: log-probabilities [N, K'] of the rollout; None: the present ones, so that all ratios are 1.
        """
        log_prob, adv = self.log_prob(rows, context), rows["adv"]
        adv = ((adv - adv.mean()) / (adv.std(correction=0) + 1e-8))[:, None] * self.algo.denoising_discount
        old = log_prob.detach() if old_log_prob is None else old_log_prob
        loss, _ = ppo_loss(log_prob, old, adv, self.algo.clip)
        return _gradient(self.actor.finetuned, loss)

    def rounded_gradient(self, rows: Any) -> Tensor:
        """Return the policy gradient in bfloat16 if observations were rounded too."""
        with mock.patch.object(ObsLinear, "forward", nn.Linear.forward):
            return self.policy_gradient(rows, BF16)

    def critic_gradient(self, rows: Any, context: Any) -> Tensor:
        """Return the flat gradient of DPPO's value loss on a minibatch."""
        with context:
            value = self.algo.value(rows["obs"])
        return _gradient(self.algo.critic, value_loss(value.float(), rows["value"], rows["target"], None))

    def ratios(self) -> dict[str, Any]:
        """Return statistics of log-ratios before any update.

        `both`: sampled and scored in bfloat16. `scored`: sampled in float32, scored in bfloat16.
        """
        obs = self.rows["obs"][: self.cfg.num_envs]  # so many are sampled at a time
        with torch.no_grad():
            scored = self.log_prob(self.rows, BF16) - self.rows["log_prob"]
            _, extra = self.actor(obs)  # in bfloat16 too
            both = self.actor.log_prob(obs, extra["chain"]) - extra["log_prob"]
        return {"both": _log_ratio_stats(both, self.algo.clip), "scored": _log_ratio_stats(scored, self.algo.clip)}

    def cosines(self) -> dict[str, float]:
        """Return cosines with the float32 gradient of the same minibatch, means over minibatches.

        `another_minibatch` compares float32 gradients of two minibatches: the noise of PPO itself.
        """
        rows_of_cosines = []
        for rows, others in zip(self.minibatches, [*self.minibatches[1:], self.rows], strict=True):
            exact = self.policy_gradient(rows, FP32)
            rows_of_cosines.append(
                {
                    "policy": _cosine(exact, self.policy_gradient(rows, BF16)),
                    "policy_mixed": _cosine(exact, self.policy_gradient(rows, BF16, rows["log_prob"])),
                    "policy_rounded": _cosine(exact, self.rounded_gradient(rows)),
                    "another_minibatch": _cosine(exact, self.policy_gradient(others, FP32)),
                    "critic": _cosine(self.critic_gradient(rows, FP32), self.critic_gradient(rows, BF16)),
                }
            )
        return {key: sum(row[key] for row in rows_of_cosines) / len(rows_of_cosines) for key in rows_of_cosines[0]}

    def seconds(self, repeats: int, min_run_time: float) -> dict[str, dict[str, float]]:
        """Return the CPU time of policy and critic gradients, without the optimizer, and of a chunk per environment."""
        obs = self.rows["obs"][: self.cfg.num_envs]

        def sample(context: Any) -> None:
            self.actor.autocast = context
            with torch.no_grad():
                self.actor(obs)

        works: dict[str, Callable[[Any], Any]] = {
            "update": lambda context: self.policy_gradient(self.rows, context),
            "critic": lambda context: self.critic_gradient(self.rows, context),
            "chunks": sample,
        }
        out = {}
        for name, work in works.items():
            pair = [lambda work=work, context=context: work(context) for context in (FP32, BF16)]
            times = interleaved_seconds(pair, repeats=repeats, min_run_time=min_run_time, clock=time.process_time)
            out[name] = dict(zip(PRECISIONS, times, strict=True))
        return out

    def after_update(self) -> dict[str, float]:
        """Update on one iteration's data and return how far log-ratios in bfloat16 are from the exact ones."""
        contexts = {"fp32": FP32, "bf16": BF16}
        old = {name: self.log_prob(self.rows, context).detach() for name, context in contexts.items()}
        self.actor.autocast = FP32
        self.algo.update(self.batch)
        ratios = {name: self.log_prob(self.rows, context).detach() - old[name] for name, context in contexts.items()}
        out = {
            "rms": ratios["fp32"].square().mean().sqrt(),
            "error": (ratios["bf16"] - ratios["fp32"]).square().mean().sqrt(),
        }
        for name, ratio in ratios.items():
            out[f"clipped_{name}"] = ((ratio.exp() - 1).abs() > self.algo.clip).float().mean()
        return {name: float(value) for name, value in out.items()}


def _gradient(module: nn.Module, loss: Tensor) -> Tensor:
    """Return the gradient of `loss` with respect to all parameters, flattened."""
    grads = torch.autograd.grad(loss, list(module.parameters()), materialize_grads=True)
    return torch.cat([grad.flatten() for grad in grads])


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a, b, dim=0))


def _log_ratio_stats(log_ratio: Tensor, clip: Tensor) -> dict[str, Any]:
    """Return statistics of log-ratios [N, K'] that are 0 in exact arithmetic."""
    return {
        "rms": float(log_ratio.square().mean().sqrt()),
        "bias": float(log_ratio.mean()),
        "rms_by_step": log_ratio.square().mean(0).sqrt().tolist(),
        "clipped": float(((log_ratio.exp() - 1).abs() > clip).float().mean()),
        "exact": float((log_ratio == 0).float().mean()),
    }


def measure(run: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return everything but learning, for the cloned policy of a run."""
    probe = Probe(run, options.iterations, options.settings)
    return {
        "weights": sum(p.numel() for p in probe.actor.finetuned.parameters()),
        "states": len(probe.rows),
        "clip": float(probe.algo.clip.min()),
        "ratios": probe.ratios(),
        "cosines": probe.cosines(),
        "seconds": probe.seconds(options.repeats, options.min_run_time),
        "after": probe.after_update(),
    }


def train(run: str, precision: str, seed: int, settings: list[str]) -> dict[str, Any]:
    """Run DPPO and return its training curve and the validation score of the final policy."""
    cfg, algo, collector = make_dppo(run, *settings, f"algo.precision={precision}", seed=seed)
    start, curve = time.process_time(), []
    for _ in algo.iterations(collector):
        metrics = collector.metrics()
        curve.append(metrics.get("train/success", metrics["train/return"]))
    seconds = time.process_time() - start
    collector.parts[0].close()
    envs = factory.environments(cfg, algo.actor.finetuned, num_envs=cfg.evaluation.num_envs)
    seeds = range(cfg.evaluation.seed, cfg.evaluation.seed + cfg.evaluation.episodes)
    score = evaluate(algo.actor, envs, seeds).score()
    envs.close()
    return {
        "precision": precision,
        "seed": seed,
        "env_steps": collector.env_steps,
        "seconds": seconds,
        "curve": curve,
        "score": score,
    }


def measure_compile(
    label: str, precision: str, overrides: tuple[str, ...], options: argparse.Namespace
) -> dict[str, Any]:
    """Return the CPU time of a cloning gradient, plain and compiled, and of compiling it."""
    cfg = compose("pretrain", ("task=avoid", "policy.obs_shape=[20]", "policy.act_dim=2", *overrides))
    seeding.seed(0)
    plain, context = factory.construct(cfg.policy, "policy").train(), autocast(precision, CPU)
    compiled = copy.deepcopy(plain)
    obs = torch.randn(cfg.train.batch_size, plain.obs_steps, 20)
    act = torch.rand(cfg.train.batch_size, plain.horizon, 2)
    mask = torch.ones(act.shape[:2], dtype=torch.bool)

    def step(policy: Any) -> None:
        with context:
            loss = policy.loss(obs, act, mask)
        _gradient(policy, loss)

    step(plain)
    start = _cpu_seconds()
    compile_denoiser(compiled)
    step(compiled)
    seconds = _cpu_seconds() - start
    times = interleaved_seconds(
        [lambda: step(plain), lambda: step(compiled)],
        repeats=options.repeats,
        min_run_time=options.min_run_time,
        clock=time.process_time,
    )
    return {
        "policy": label,
        "precision": precision,
        "compiling": seconds,
        "plain": times[0],
        "compiled": times[1],
    }


def _cpu_seconds() -> float:
    """Return the CPU time of this process and of its finished children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def parse_options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="of pretrain.py, one per task")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too, on new policies")
    parser.add_argument("--seeds", type=int, default=0, help="measure learning instead, this many runs per precision")
    parser.add_argument("--settings", nargs="+", default=["algo.env_steps=130000"], help="of finetune.py")
    parser.add_argument("--iterations", type=int, default=3, help="of DPPO in float32 before gradients are compared")
    parser.add_argument("--repeats", type=int, default=5, help="measurements; the median counts")
    parser.add_argument("--min-run-time", type=float, default=0.1, help="seconds of a measurement")
    parser.add_argument("--out", type=Path, default=OUT, help="results are added to it")
    return parser.parse_args()


def main() -> None:
    """Run the command line."""
    options = parse_options()
    torch.set_num_threads(1)  # CPU time is measured
    if options.out.is_file():
        result = read_json(options.out)
    else:
        result = {"machine": machine() | {"threads": 1}, "versions": versions(), "tasks": {}}
    if options.compile:
        result["compile"] = []
        for label, overrides in COMPILED.items():
            for precision in PRECISIONS:
                result["compile"].append(measure_compile(label, precision, overrides, options))
                write_json(options.out, result)
                print(result["compile"][-1], flush=True)
    for run in options.runs:
        entry = result["tasks"].setdefault(checkpoint.load(run).task, {})
        if not options.seeds:
            entry |= measure(run, options)
            write_json(options.out, result)
        for seed in range(options.seeds):
            for precision in PRECISIONS:
                finished = entry.setdefault("learning", [])
                if any((other["precision"], other["seed"]) == (precision, seed) for other in finished):
                    continue  # of an interrupted measurement
                finished.append(train(run, precision, seed, options.settings))
                write_json(options.out, result)
                print({key: value for key, value in finished[-1].items() if key != "curve"}, flush=True)


if __name__ == "__main__":
    main()
