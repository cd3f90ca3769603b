"""Several runs of one profile that differ only in the seed: mean and spread of every score, from the runs' records.

for seed in 1 2 3; do make speedrun RUN=seed$seed OPTIONS="-p override all.seed=$seed"; done
python benchmarks/seeds.py seed1 seed2 seed3 --record runs_recorded/kindergarten_seeds.json
"""
import argparse, json, statistics
from pathlib import Path

from nanochat.common import Run
from nanochat.report import read_records, scores


def collect(names: list[str]) -> dict: # measure → stage → values, one a run
    "The scores of all runs, side by side"
    tables = [scores(read_records(Run.open(name))) for name in names]
    return {measure: {stage: [round(table[measure][stage][0], 6) for table in tables] for stage in row} for measure, row in tables[0].items()}


def show(values: list[float]) -> str:
    "Mean and, behind it, how far the runs lie apart"
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--record", help="write everything to this JSON file")
    args = parser.parse_args()
    table, runs = collect(args.runs), [Run.open(name) for name in args.runs]
    stages = sorted({stage for row in table.values() for stage in row}, key=["base", "mid", "sft", "rl"].index)
    print(f"{'':<28}" + "".join(f"{stage:<26}" for stage in stages))
    for measure, row in table.items(): print(f"{measure:<28}" + "".join(f"{show(row[stage]) if stage in row else '':<26}" for stage in stages))
    seconds = {p.stem: [run.read_json("stages", p.name)["seconds"] for run in runs] for p in sorted(runs[0].path("stages").glob("*.json"))}
    print("minutes:", ", ".join(f"{sum(column) / 60:.1f}" for column in zip(*seconds.values())))
    if args.record:
        record = dict(profile=runs[0].info["profile"], seeds=[run.record("base")["options"]["seed"] for run in runs], machine=runs[0].info.get("machine"),
                      git=runs[0].info.get("git"), scores=table, seconds=seconds, options={stage: run_record["options"] for stage in ("dataset", "tokenizer", "base", "mid", "sft", "rl")
                      if (run_record := runs[0].record(stage))})
        Path(args.record).write_text(json.dumps(record, indent=1) + "\n")
