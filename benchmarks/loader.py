"""The data loader against the bare encoder: tokens a second of one process on the same cores and the same documents, in turns.

python benchmarks/loader.py [--data FOLDER of parquet shards] [--cores 1]
"""
import argparse, os, statistics, tempfile, time
from pathlib import Path

import pyarrow as pa, pyarrow.parquet as pq
import torch

from nanochat.dataloader import DocumentLoader
from nanochat.dataset import parquet_documents
from nanochat.kindergarten import make_world_root
from nanochat.tokenizer import Tokenizer


def bare(texts: list[str], tokenizer: Tokenizer) -> float:
    "Tokens a second of the encoder alone, 128 documents at once, from memory"
    start, tokens = time.perf_counter(), 0
    for first in range(0, len(texts), 128): tokens += len(tokenizer.encode_flat(texts[first:first + 128], tokenizer.bos)[0])
    return tokens / (time.perf_counter() - start)


def loaded(files: list[Path], tokenizer: Tokenizer, batch_size: int, sequence_len: int) -> float:
    "Tokens a second of whole batches, from shards on disk"
    loader = DocumentLoader(files, tokenizer, batch_size, sequence_len)
    start, tokens = time.perf_counter(), 0
    while loader.epoch == 0: tokens += next(loader).inputs.numel()
    return tokens / (time.perf_counter() - start)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data")
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.data: files = sorted(Path(args.data).glob("*.parquet"))
    else:
        make_world_root(Path(folder := tempfile.mkdtemp()), people=2000, documents=60_000)
        files = sorted((Path(folder) / "karpathy" / "fineweb-edu-100b-shuffle").glob("*.parquet"))
    texts = list(parquet_documents(files))
    tokenizer = Tokenizer.train(texts, args.vocab_size)
    if hasattr(os, "sched_setaffinity"): os.sched_setaffinity(0, range(args.cores))
    torch.set_num_threads(args.cores)
    rates = [(bare(texts, tokenizer), loaded(files, tokenizer, 32, 2048)) for _ in range(args.rounds)]
    encoder, loader = (statistics.median(column) for column in zip(*rates))
    print(f"{sum(map(len, texts)) / 1e6:.1f} million characters, {args.cores} core(s): encoder {encoder / 1e6:.1f}, loader {loader / 1e6:.1f} million tokens/s, ratio {loader / encoder:.2f}")
