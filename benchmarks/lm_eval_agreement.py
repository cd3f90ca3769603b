"""Do lm-evaluation-harness and ours decide alike, example by example, on a real model and real questions?

    python benchmarks/lm_eval_agreement.py MODEL DATA OUT.json [--gguf FILE] [--items 100]

MODEL: a folder or name that `transformers` opens. DATA: a data root with an evaluation bundle and the chat tasks. Both sides get the same texts."""
import argparse
import importlib.metadata as metadata
import json
import time
from dataclasses import replace
from pathlib import Path

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from nanochat import hf
from nanochat.common import write_atomic
from nanochat.core import load_bundle, load_items, render_prompts, score_items, tokenize_prompts
from nanochat.dataset import find_bundle
from nanochat.evaluate import choose_letters
from nanochat.tasks import load_task

CORE_TASKS, LETTER_TASKS = ("arc_easy", "piqa", "boolq", "hellaswag_zeroshot"), ("ARC-Easy", "MMLU")


def best(scores): return max(range(len(scores)), key=scores.__getitem__)

def ask_harness(harness, pairs: list[list[tuple[str, str]]]) -> list[list[float]]:
    "The log-probability of each continuation, item by item"
    flat = iter(harness.loglikelihood([Instance("loglikelihood", {}, pair, 0) for item in pairs for pair in item], disable_tqdm=True))
    return [[next(flat)[0] for _ in item] for item in pairs]

def shared_part(harness, pair: tuple[str, str], row) -> float:
    "The log-probability of what all choices begin with: CORE's rule leaves it out, since it is the same for each"
    context = harness._encode_pair(*pair)[0]
    return harness._loglikelihood_tokens([(pair, context, row.ids[len(context):row.start])], disable_tqdm=True)[0][0] if len(context) < row.start else 0.0

def compare_core(model, tokenizer, harness, task, items: list[dict]) -> list[dict]:
    "Multiple choice without solved examples: both sides by the sum, which is the harness's rule, and by the mean of the tokens in which choices differ, which is CORE's"
    start = tokenizer.theirs.decode([tokenizer.bos])
    rows = [tokenize_prompts(task.kind, render_prompts(task, item, []), tokenizer) for item in items]
    means = [[-loss for loss, _ in item] for item in score_items(model, rows, tokenizer.bos, model.device, tokens=1024)]
    pairs = [[(start + item["query"] + task.delimiter, choice) for choice in item["choices"]] for item in items]
    found = []
    for item, row, ours, pair, theirs in zip(items, rows, means, pairs, ask_harness(harness, pairs)):
        lengths, shared = [r.stop - r.start for r in row], shared_part(harness, pair[0], row[0])
        sums, their_means = [mean * n for mean, n in zip(ours, lengths)], [(nats - shared) / n for nats, n in zip(theirs, lengths)]
        found.append(dict(gold=item["gold"], ours_sum=best(sums), theirs_sum=best(theirs), ours_mean=best(ours), theirs_mean=best(their_means),
                          gap=max(abs(a + shared - b) for a, b in zip(sums, theirs))))
    return found

def compare_letters(model, tokenizer, harness, conversations: list[dict]) -> list[dict]:
    "One letter of a chat: both sides by the likeliest"
    ours = choose_letters(model, tokenizer, conversations, batch_size=4)
    texts = [tokenizer.theirs.decode(tokenizer.render_for_completion(each["messages"])) for each in conversations]
    theirs = ask_harness(harness, [[(text, letter) for letter in each["letters"]] for text, each in zip(texts, conversations)])
    return [dict(gold=each["letters"].index(each["messages"][-1]["content"]), ours_sum=each["letters"].index(mine), theirs_sum=best(scores))
            for each, mine, scores in zip(conversations, ours, theirs)]

def summarise(found: list[dict]) -> dict:
    "Items, agreement and accuracy by each rule"
    summary = dict(items=len(found), largest_gap_nats=max((each["gap"] for each in found if "gap" in each), default=None))
    for rule in ("sum", "mean"):
        if f"ours_{rule}" not in found[0]: continue
        summary[rule] = dict(same=sum(each[f"ours_{rule}"] == each[f"theirs_{rule}"] for each in found),
                             **{f"{who}_right": sum(each[f"{who}_{rule}"] == each["gold"] for each in found) for who in ("ours", "theirs")})
    return summary

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data", "out"): parser.add_argument(name)
    parser.add_argument("--gguf")
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--round", type=int, default=25, help="items of each task before the record is written again")
    args = parser.parse_args()
    started = time.time()
    model, tokenizer = hf.borrow(args.model, **(dict(gguf_file=args.gguf) if args.gguf else {}))
    harness = HFLM(pretrained=model.model, tokenizer=tokenizer.theirs, batch_size=4, device="cpu")
    bundle = {task.label: replace(task, num_fewshot=0) for task in load_bundle(find_bundle(Path(args.data)))}
    questions = {name: load_items(bundle[name]) for name in CORE_TASKS} | {name: load_task(name, "test", Path(args.data)) for name in LETTER_TASKS}
    found = {name: [] for name in questions}
    for first in range(0, args.items, args.round):
        for name, all_of in questions.items():
            some = [all_of[i] for i in range(first, min(first + args.round, args.items))]
            found[name] += compare_core(model, tokenizer, harness, bundle[name], some) if name in bundle else compare_letters(model, tokenizer, harness, some)
            record = dict(model=Path(args.gguf or args.model).name, parameters=sum(p.numel() for p in model.parameters()), dtype="float32", device="cpu", shots=0,
                          versions={package: metadata.version(package) for package in ("lm_eval", "transformers", "torch")},
                          seconds=round(time.time() - started), tasks={name: summarise(each) for name, each in found.items() if each})
            write_atomic(Path(args.out), json.dumps(record, indent=1) + "\n")
            print(f"{time.time() - started:6.0f} s  {name}: {record['tasks'][name]}", flush=True)


if __name__ == "__main__": main()
