"""Grading a trained model: many questions together against one at a time, the same questions, in turns; both must give the same answers.

python benchmarks/evaluation.py --run NAME [--stage sft] [--problems 256] [--rounds 3] [--threads 1] [--record FILE.json]

Written answers go through the engine, with slots for one and for several; chosen letters, and chosen whole lines, through forward passes of one
question and of several. For lines there is also the plain way, in which a question is read again for each of its four replies.
"""
import argparse, json, statistics, time
from pathlib import Path

import torch

from nanochat.checkpoint import load_model
from nanochat.common import Run, compute_init
from nanochat.evaluate import choose_letters, choose_replies, likeliest, prompt_ids, reply_losses, write_replies
from nanochat.tasks import load_task
from training import cpu_features

TOGETHER = dict(written=(1, 16, 64, 256), letters=(1, 8, 64), lines=(1, 8, 64))
TASKS = dict(written=("GSM8K", "letter"), letters=("ARC-Easy", "letter"), lines=("ARC-Easy", "line"))


def read_again(model, tokenizer, problems: list[dict], batch_size: int) -> list[str]:
    "`choose_replies` with a row for each question and reply"
    end, chosen = tokenizer.special["<|assistant_end|>"], []
    for first in range(0, len(problems), batch_size):
        batch = problems[first:first + batch_size]
        rows = [(prompt_ids(tokenizer, each, model.config.sequence_len), tokenizer.encode(reply) + [end]) for each in batch for reply in each["letters"]]
        losses = iter(reply_losses(model, rows, tokenizer.bos))
        chosen += [each["letters"][likeliest([next(losses) for _ in each["letters"]], False)] for each in batch]
    return chosen


def seconds_of(function) -> tuple[float, list]:
    "What it takes, and what it returns"
    start = time.perf_counter()
    found = function()
    return time.perf_counter() - start, found


def compare(ways: dict, rounds: int) -> tuple[dict, dict]:
    "Median seconds of each way, and the share of the first way's answers that it gives, too"
    seconds, answers = {name: [] for name in ways}, {}
    for _ in range(rounds):
        for name, way in ways.items():
            spent, answers[name] = seconds_of(way)
            seconds[name].append(spent)
    first = next(iter(answers.values()))
    return {name: round(statistics.median(each), 3) for name, each in seconds.items()}, {name: statistics.mean(a == b for a, b in zip(each, first)) for name, each in answers.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", required=True)
    parser.add_argument("--stage", default="sft")
    for name, value in dict(problems=256, rounds=3, threads=1).items(): parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--record", help="write the figures to this JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    run, compute = Run.open(args.run), compute_init("cpu")
    model, tokenizer = load_model(run, args.stage, compute.device)[:2]
    results = {}
    for kind, (name, quiz) in TASKS.items():
        problems = list(load_task(name, "test", run.data_root, stop=args.problems, quiz=quiz))
        answer = dict(written=lambda n: write_replies(model, tokenizer, problems, 256, n), letters=lambda n: choose_letters(model, tokenizer, problems, n),
                      lines=lambda n: choose_replies(model, tokenizer, problems, n))[kind]
        ways = {f"{n} at a time": (lambda n=n: answer(n)) for n in TOGETHER[kind]}
        if kind == "lines": ways["8, read again"] = lambda: read_again(model, tokenizer, problems, 8)
        ways["1 at a time"]()  # warm up
        seconds, same = compare(ways, args.rounds)
        results[kind] = dict(task=name, problems=len(problems), seconds=seconds, same_answers=same)
        for way, spent in seconds.items():
            print(f"{kind:<8} {way:<14} {spent:7.2f} s for {len(problems)} problems   {seconds['1 at a time'] / spent:5.1f} times as fast   {same[way]:.1%} the same answers", flush=True)
    if args.record:
        record = dict(stage=args.stage, depth=model.config.n_layer, width=model.config.n_embd, threads=args.threads, rounds=args.rounds, cpu=cpu_features(), torch=torch.__version__, results=results)
        Path(args.record).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__": main()
