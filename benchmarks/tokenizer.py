"""BPE training and encoding: rustbpe of this project against published packages, on the same text, in turns, each in a process of its own.

python benchmarks/tokenizer.py [--text FILE ...] [--megabytes 50] [--threads 1 2] [--rounds 3]

FILE: .jsonl (all strings of a line make a document) or plain text (a document a paragraph). Without one, text of the kindergarten.
"""
import argparse, json, random, statistics, sys, tempfile
from pathlib import Path

from peers import measure, peers_python

HEAD = r"""
import json, sys, time
def memory(line): return next(int(row.split()[1]) for row in open("/proc/self/status") if row.startswith(line)) / 1024
texts = json.load(open(sys.argv[1]))
whole = "\n\n".join(texts).encode() if {joined} else b""
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
before = memory("VmRSS")
start = time.perf_counter()
{job}
print(json.dumps(dict(seconds=time.perf_counter() - start, memory_mb=memory("VmHWM") - before)))
"""
TRAINERS = {
    "nanochat": "import rustbpe; rustbpe.train(texts, int(sys.argv[2]))",
    "rustbpe 0.1.0": "import rustbpe; t = rustbpe.Tokenizer(); t.train_from_iterator(iter(texts), int(sys.argv[2]), pattern=sys.argv[3])",
    "gigatoken": "import gigatoken; gigatoken.train_bpe(whole, int(sys.argv[2]), [])",
    "tokenizers": """
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
t = Tokenizer(models.BPE())
split = pre_tokenizers.Split(Regex(sys.argv[3].replace("?+", "?").replace("++", "+")), "isolated")
t.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
t.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=int(sys.argv[2]), show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))""",
}

ENCODE = """
import base64, json, sys, time
texts = json.load(open(sys.argv[1]))
ranks = {{base64.b64decode(a): int(b) for a, b in map(str.split, open(sys.argv[2]))}}
{setup}
times = []
for _ in range(3):
    start = time.perf_counter(); {job}; times.append(time.perf_counter() - start)
print(json.dumps(dict(first=times[0], seconds=min(times))))
"""
GIGA = "import gigatoken; t = gigatoken.Tokenizer.from_tiktoken(sys.argv[2], pretokenizer='gpt4')"
OURS = "import rustbpe; t = rustbpe.Encoder(list(ranks))"
ENCODERS = { # name: (setup, documents to arrays, documents to lists, one long text)
    "nanochat": (OURS, "t.encode_flat(texts)", "t.encode_batch(texts)", "t.encode_flat([whole])"),
    "gigatoken": (GIGA, "t.encode_batch(texts, parallel=False)", "t.encode_batch_list(texts, parallel=False)", "t.encode(whole)"),
    "tiktoken": ("import tiktoken; t = tiktoken.Encoding('x', pat_str=sys.argv[3], mergeable_ranks=ranks, special_tokens={})",
                 "[t.encode_to_numpy(x) for x in texts]", "[t.encode_ordinary(x) for x in texts]", "t.encode_to_numpy(whole)"),
}


def documents(files: list[str], megabytes: float) -> list[str]:
    "Text of about that size, from the files or else from the kindergarten"
    def strings(value):
        if isinstance(value, str): yield value
        elif isinstance(value, (list, dict)):
            for part in value.values() if isinstance(value, dict) else value: yield from strings(part)
    def source():
        for file in files:
            if file.endswith(".jsonl"): yield from ("\n".join(strings(json.loads(line))) for line in open(file))
            else: yield from Path(file).read_text().split("\n\n")
        if files: return
        from nanochat.kindergarten import World, document, programs
        world, rng, code = World(2000, 1), random.Random(1), programs(1, False)
        while True: yield document(world, rng, code)
    texts, size = [], 0
    for text in source():
        if size >= megabytes * 1e6: break
        texts.append(text); size += len(text.encode())
    return texts


def table(title: str, rows: dict[str, list[float]], size: float, ours: str = "nanochat") -> dict:
    "Print medians and the ratio of each peer's time to ours"
    medians = {name: statistics.median(times) for name, times in rows.items()}
    print(f"\n{title}")
    for name, seconds in medians.items(): print(f"  {name:<16} {seconds:7.2f} s  {size / seconds:6.0f} MB/s   nanochat is {seconds / medians[ours]:5.1f} times as fast")
    return medians


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", nargs="*", default=[])
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--vocab-size", type=int, default=65_536)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", help="write the medians to this JSON file")
    args = parser.parse_args()
    from nanochat.tokenizer import SPLIT_PATTERN, Tokenizer
    peers, folder = peers_python(), Path(tempfile.mkdtemp())
    pythons = {name: Path(sys.executable) if name == "nanochat" else peers for name in (*TRAINERS, *ENCODERS)}
    texts = documents(args.text, args.megabytes)
    size = sum(len(text.encode()) for text in texts) / 1e6
    (folder / "texts.json").write_text(json.dumps(texts))
    record = dict(megabytes=round(size, 1), documents=len(texts), vocab_size=args.vocab_size, rounds=args.rounds)
    print(f"{size:.1f} MB in {len(texts):,} documents, vocabulary {args.vocab_size:,}, medians of {args.rounds} rounds")
    for threads in args.threads:
        rounds = [{name: measure(pythons[name], HEAD.format(job=job, joined=name == 'gigatoken'), str(folder / "texts.json"), str(args.vocab_size), SPLIT_PATTERN, threads=threads)
                   for name, job in TRAINERS.items()} for _ in range(args.rounds)]
        seconds = table(f"training, {threads} thread{'s' * (threads > 1)}", {name: [r[name]["seconds"] for r in rounds] for name in TRAINERS}, size)
        memory = {name: round(statistics.median(r[name]["memory_mb"] for r in rounds)) for name in TRAINERS}
        print("  memory beyond the text, MB:", memory)
        record[f"training_{threads}_threads"] = dict(seconds=seconds, memory_mb=memory)
    Tokenizer.train(texts, args.vocab_size).save(folder / "tokenizer")
    for i, kind in enumerate(("documents to arrays", "documents to lists", "one long text"), start=1):
        jobs = {name: ENCODE.format(setup=setup[0] + "\nwhole = '\\n\\n'.join(texts)" * (i == 3), job=setup[i]) for name, setup in ENCODERS.items()}
        rounds = [{name: measure(pythons[name], job, str(folder / "texts.json"), str(folder / "tokenizer" / "ranks.tiktoken"), SPLIT_PATTERN, threads=1)
                   for name, job in jobs.items()} for _ in range(args.rounds)]
        warm, cold = ({name: [r[name][key] for r in rounds] for name in ENCODERS} for key in ("seconds", "first"))
        record[f"encoding {kind}"] = dict(warm=table(f"encoding, 1 thread, {kind}", warm, size), first=table(f"encoding, 1 thread, {kind}, the first time", cold, size))
    if args.record: Path(args.record).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__": main()
