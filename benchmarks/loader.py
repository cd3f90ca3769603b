"""The data loader against the bare encoder: tokens a second of one process on the same cores and the same documents, in turns.

python benchmarks/loader.py [--data FOLDER of parquet shards] [--cores 1] [--record FILE.json]

The bare encoder gets its documents as a list of Python strings in memory, 128 at once; the loader reads shards from disk and makes whole batches.
Reading alone unpacks the same shards and does nothing with them: on one core, encoder and reading together bound what any loader can reach.
"""
import argparse, json, math, os, statistics, tempfile, time
from pathlib import Path

import torch

from nanochat.dataloader import DocumentLoader
from nanochat.dataset import parquet_documents, parquet_row_groups
from nanochat.kindergarten import make_world_root
from nanochat.tokenizer import Tokenizer


def bare(texts: list[str], tokenizer: Tokenizer) -> float:
    "Tokens a second of the encoder alone, 128 documents at once, from memory"
    start, tokens = time.perf_counter(), 0
    for first in range(0, len(texts), 128): tokens += len(tokenizer.encode_flat(texts[first:first + 128], tokenizer.bos)[0])
    return tokens / (time.perf_counter() - start)


def unpacked(files: list[Path], tokens: int) -> float:
    "Tokens a second of reading alone, which makes no tokens but unpacks the text of so many"
    start = time.perf_counter()
    for _ in parquet_row_groups(files): pass
    return tokens / (time.perf_counter() - start)


def loaded(files: list[Path], tokenizer: Tokenizer, packing: str, tokens: int) -> float:
    "Tokens a second of whole batches, from shards on disk, when the loader's threads are at work"
    loader = DocumentLoader(files, tokenizer, 32, 2048, packing=packing)
    for _ in range(10): next(loader)
    start, batches = time.perf_counter(), math.ceil(tokens / (32 * 2048))
    for _ in range(batches): next(loader)
    return batches * 32 * 2048 / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", help="folder of parquet shards; without it text of the kindergarten")
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", help="write the medians to this JSON file")
    args = parser.parse_args()
    if args.data: files = sorted(Path(args.data).glob("*.parquet"))
    else:
        make_world_root(Path(folder := tempfile.mkdtemp()), people=2000, documents=60_000)
        files = sorted((Path(folder) / "karpathy" / "fineweb-edu-100b-shuffle").glob("*.parquet"))
    texts = list(parquet_documents(files))
    tokenizer = Tokenizer.train(texts, args.vocab_size)
    if hasattr(os, "sched_setaffinity"): os.sched_setaffinity(0, range(args.cores))
    torch.set_num_threads(args.cores)
    tokens = len(tokenizer.encode_flat(texts, tokenizer.bos)[0])
    jobs = dict(encoder=lambda: bare(texts, tokenizer), reading=lambda: unpacked(files, tokens), flat=lambda: loaded(files, tokenizer, "flat", 3 * tokens), best_fit=lambda: loaded(files, tokenizer, "best_fit", tokens))
    rounds = [{name: job() for name, job in jobs.items()} for _ in range(args.rounds)]
    rates = {name: statistics.median(each[name] for each in rounds) for name in jobs}
    print(f"{sum(map(len, texts)) / 1e6:.1f} million characters, {args.cores} core(s), million tokens/s (ratio to the encoder): "
          + ", ".join(f"{name} {rate / 1e6:.1f} ({rate / rates['encoder']:.2f})" for name, rate in rates.items()))
    bound = 1 / (1 / rates["encoder"] + 1 / rates["reading"])
    print(f"encoding after reading on one core: {bound / 1e6:.1f} ({bound / rates['encoder']:.2f}); the flat loader reaches {rates['flat'] / bound:.2f} of that")
    record = dict(characters=sum(map(len, texts)), cores=args.cores, rounds=args.rounds, vocab_size=args.vocab_size, tokens_per_second={name: round(rate) for name, rate in rates.items()})
    if args.record: # one entry for each number of cores
        path = Path(args.record)
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | {f"{args.cores}_cores": record}, indent=1) + "\n")


if __name__ == "__main__": main()
