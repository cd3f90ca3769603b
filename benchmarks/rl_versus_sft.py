"""Does reinforcement learning help more than the same seconds of finetuning? On a complete run, from the same finetuned weights.

python benchmarks/rl_versus_sft.py --run kindergarten
"""
import argparse, json, math, shutil, time
from functools import partial

from nanochat.checkpoint import load_model
from nanochat.common import Run, compute_init
from nanochat.dataloader import ConversationLoader
from nanochat.grpo import solve_rate
from nanochat.muon import lr_multiplier, make_optimizers
from nanochat.tasks import load_task, sft_mixture
from nanochat.train import Trainer


def more_finetuning(run: Run, seconds: float, rows: dict, compute, name: str) -> tuple:
    "Finetune the finetuned model for some seconds more, with the stage's own options; returns the model and the steps taken"
    options = run.record("sft")["options"]
    model, tokenizer, _ = load_model(run, "sft", compute.device)
    model.compute_dtype = compute.dtype
    shutil.rmtree(run.path(name), ignore_errors=True)
    loader = ConversationLoader(sft_mixture(run.data_root, rows, options["seed"] + 1, options["quiz"]), tokenizer, options["batch_size"],
                                options["sequence_len"] or model.config.sequence_len, packing="padded", mask=True, seed=options["seed"] + 1)
    rates = (options[k] * options["lr_scale"] for k in ("matrix_lr", "embedding_lr", "unembedding_lr"))
    trainer = Trainer(model, make_optimizers(model, *rates), loader, run, compute, name, tokenizer, None, seconds / 60,
                      options["examples_per_step"] // options["batch_size"], partial(lr_multiplier, warmdown=1.0), compile=options["compile"], log_every=50)
    trainer.fit()
    return model, tokenizer, trainer.step


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", default="kindergarten")
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--sums", action="store_true", help="also a second control, finetuned on the word problems alone")
    parser.add_argument("--record", help="write the figures to this JSON file")
    args = parser.parse_args()
    run, compute = Run.open(args.run), compute_init("cpu")
    rl, sft = run.record("rl"), run.record("sft")
    test, tokens = load_task("GSM8K", "test", run.data_root), rl["options"]["max_tokens"]
    problems = min(args.problems, len(test))
    def solved(model, tokenizer): return solve_rate(model, tokenizer, test, compute, problems, tokens)
    results = {"sft": solved(*load_model(run, "sft", compute.device)[:2]), "rl": solved(*load_model(run, "rl", compute.device)[:2])}
    controls = {"control_mixture": sft["options"]["mixture"]} | ({"control_sums": {"GSM8K": sft["options"]["mixture"]["GSM8K"]}} if args.sums else {})
    for name, rows in controls.items():
        model, tokenizer, steps = more_finetuning(run, rl["results"]["train_seconds"], rows, compute, name)
        results[name] = solved(model, tokenizer)
    error = {k: math.sqrt(p * (1 - p) / problems) for k, p in results.items()}
    for name, share in results.items(): print(f"{name:<16} {share:.3f} ± {error[name]:.3f}")
    def told(name):
        gain, noise = results[name] - results["sft"], math.hypot(error[name], error["sft"])
        return f"{gain:+.3f} ({gain / noise:+.1f} standard errors)"
    print(f"{rl['results']['train_seconds']:.0f} s of reinforcement {told('rl')}; " + "; ".join(f"of {name} {told(name)}" for name in controls))
    if args.record:
        record = dict(run=args.run, seed=rl["options"]["seed"], problems=problems, seconds=rl["results"]["train_seconds"], solved=results, standard_error=error)
        with open(args.record, "w") as file: file.write(json.dumps(record, indent=1) + "\n")
