"""What each stage brings to that for which it is there, on complete runs that differ in the seed: the same questions before and after, paired.

for seed in 1 2 3; do make speedrun RUN=seed$seed OPTIONS="-p override all.seed=$seed"; done
python benchmarks/stage_gains.py seed1 seed2 seed3 --record runs_recorded/stage_gains.json
"""
import argparse, json, re
from itertools import chain
from pathlib import Path

import torch

from nanochat.checkpoint import load_model
from nanochat.common import Run, compute_init
from nanochat.evaluate import choose_replies, paired_difference, write_replies
from nanochat.tasks import load_task
from training import cpu_features

QUIZZES = ("ARC-Easy", "ARC-Challenge", "MMLU")
FORMS = {"form of a quiz": r"- [^\n=]+=[A-D]", "form of a sum": r"(?s).*<<[^<>]+=[^<>]+>>.*\n#### -?[\d.,]+"}
STAGES = dict(mid=("base", tuple(FORMS)), sft=("mid", ("quizzes", "facts", "sums")), rl=("sft", ("sums",)))


def quizzes(run: Run) -> list: return [load_task(name, "test", run.data_root, quiz="line") for name in QUIZZES]


def measure(run: Run, stage: str, what: str, problems: int) -> list[bool]: # one verdict a question
    "Let the model of a stage answer at most so many questions of each task"
    model, tokenizer, _ = load_model(run, stage, "cpu")
    def written(task, asked): return write_replies(model, tokenizer, asked, 96, 128)
    if what == "quizzes": return [bool(task.evaluate(c, reply)) for task in quizzes(run) for asked in [list(task[:problems])] for c, reply in zip(asked, choose_replies(model, tokenizer, asked, 32))]
    task = quizzes(run)[0] if what == "form of a quiz" else load_task("Facts" if what == "facts" else "GSM8K", "test", run.data_root)
    asked = list(task[:problems])
    replies = written(task, asked)
    if what in FORMS: return [bool(re.fullmatch(FORMS[what], reply)) for reply in replies]
    return [bool(task.evaluate(c, reply)) for c, reply in zip(asked, replies)]


def gain(before: list[bool], after: list[bool]) -> dict:
    "Shares before and after, the difference, its standard error from the questions whose verdict changed, and their ratio (None: all verdicts changed alike)"
    difference, error = paired_difference(after, before)
    return dict(questions=len(after), before=sum(before) / len(before), after=sum(after) / len(after), gain=difference, error=error, z=difference / error if error else None)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--problems", type=int, default=1000, help="questions of each task, at most")
    parser.add_argument("--record", help="write the figures to this JSON file")
    args = parser.parse_args()
    compute_init("cpu")
    torch.set_grad_enabled(False)
    runs, table = [Run.open(name) for name in args.runs], []
    for stage, (previous, measures) in STAGES.items():
        for what in measures:
            pairs = [[measure(run, each, what, args.problems) for each in (previous, stage)] for run in runs]
            row = dict(stage=stage, measure=what, seeds=[gain(*pair) for pair in pairs], all=gain(*(list(chain(*side)) for side in zip(*pairs))))
            table.append(row)
            def errors(z): return "all" if z is None else f"{z:+.1f}"
            print(f"{stage:<4} {what:<14} {row['all']['before']:.3f} to {row['all']['after']:.3f}   gain {row['all']['gain']:+.4f} = {errors(row['all']['z'])} errors   by seed "
                  + ", ".join(f"{each['before']:.3f} to {each['after']:.3f} ({errors(each['z'])})" for each in row["seeds"]), flush=True)
    if args.record:
        record = dict(profile=runs[0].info["profile"], seeds=[run.record("base")["options"]["seed"] for run in runs], problems=args.problems, cpu=cpu_features(), torch=torch.__version__,
                      minutes=[round(sum(run.read_json("stages", p.name)["seconds"] for p in run.path("stages").glob("*.json")) / 60, 1) for run in runs], git=runs[0].info.get("git"), gains=table)
        Path(args.record).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__": main()
