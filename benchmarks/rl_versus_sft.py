"""Does reinforcement learning help more than the same seconds of finetuning? On a complete run, from the same finetuned weights.

python benchmarks/rl_versus_sft.py --run kindergarten
"""
import argparse, json, shutil
from functools import partial

from nanochat.checkpoint import load_model
from nanochat.common import Run, compute_init
from nanochat.dataloader import ConversationLoader
from nanochat.engine import Engine
from nanochat.evaluate import paired_difference
from nanochat.muon import lr_multiplier, make_optimizers
from nanochat.tasks import load_task, sft_mixture
from nanochat.train import Trainer


def more_finetuning(run: Run, steps: int, rows: dict, compute, name: str) -> tuple: # model, tokenizer
    "Finetune the finetuned model for some steps more, with the stage's own options"
    options = run.record("sft")["options"]
    model, tokenizer, _ = load_model(run, "sft", compute.device)
    model.compute_dtype = compute.dtype
    shutil.rmtree(run.path(name), ignore_errors=True)
    loader = ConversationLoader(sft_mixture(run.data_root, rows, options["seed"] + 1, options["quiz"]), tokenizer, options["batch_size"],
                                options["sequence_len"] or model.config.sequence_len, packing="padded", mask=True, seed=options["seed"] + 1)
    rates = (options[k] * options["lr_scale"] for k in ("matrix_lr", "embedding_lr", "unembedding_lr"))
    trainer = Trainer(model, make_optimizers(model, *rates), loader, run, compute, name, tokenizer, steps, 0.0,
                      options["examples_per_step"] // options["batch_size"], partial(lr_multiplier, warmdown=1.0), compile=options["compile"], log_every=50)
    trainer.fit()
    return model, tokenizer


def solved(model, tokenizer, task, problems: list, max_tokens: int) -> list[bool]: # one verdict a problem
    "Which problems the model answers right, greedily"
    groups = Engine(model, tokenizer, max_batch=256).generate([tokenizer.render_for_completion(p) for p in problems], max_tokens=max_tokens, temperature=0.0)
    return [bool(task.evaluate(p, tokenizer.decode(g[0].ids))) for p, g in zip(problems, groups)]


def compared(verdicts: list[bool], before: list[bool]) -> dict:
    "The gain over the same problems before: only those whose verdict changed tell anything (the standard error of paired differences, as in McNemar's test)"
    fixed, broken = sum(v > b for v, b in zip(verdicts, before)), sum(v < b for v, b in zip(verdicts, before))
    gain, error = paired_difference(verdicts, before)
    return dict(solved=sum(verdicts) / len(verdicts), gain=gain, error=error, fixed=fixed, broken=broken, z=gain / error if error else 0.0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", default="kindergarten")
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--control-steps", type=int, default=0, help="steps of more finetuning (default: as many as take the seconds of reinforcement, at the recorded paces of both stages)")
    parser.add_argument("--sums", action="store_true", help="also a second control, finetuned on the word problems alone")
    parser.add_argument("--record", help="write the figures to this JSON file")
    args = parser.parse_args()
    run, compute = Run.open(args.run), compute_init("cpu")
    rl, sft = run.record("rl"), run.record("sft")
    test, tokens = load_task("GSM8K", "test", run.data_root), rl["options"]["max_tokens"]
    problems = [test[i] for i in range(min(args.problems, len(test)))]
    answers = {stage: solved(*load_model(run, stage, compute.device)[:2], test, problems, tokens) for stage in ("sft", "rl")}
    steps = args.control_steps or round(rl["results"]["train_seconds"] * sft["results"]["steps"] / sft["results"]["train_seconds"])
    controls = {"control_mixture": sft["options"]["mixture"]} | ({"control_sums": {"GSM8K": sft["options"]["mixture"]["GSM8K"]}} if args.sums else {})
    for name, rows in controls.items():
        answers[name] = solved(*more_finetuning(run, steps, rows, compute, name), test, problems, tokens)
    results = {name: compared(verdicts, answers["sft"]) for name, verdicts in answers.items()}
    for name, row in results.items():
        print(f"{name:<16} {row['solved']:.3f}, {row['gain']:+.3f} ± {row['error']:.3f}: {row['fixed']} more right, {row['broken']} more wrong, {row['z']:+.1f} standard errors")
    if args.record:
        record = dict(run=args.run, seed=rl["options"]["seed"], problems=len(problems), seconds=rl["results"]["train_seconds"], control_steps=steps, results=results)
        with open(args.record, "w") as file: file.write(json.dumps(record, indent=1) + "\n")
