"""BPE training: rustbpe against Hugging Face's `tokenizers`, on the same text and split pattern, in turns.

python benchmarks/tokenizer_training.py [--vocab-size 8192] [--rounds 3]
"""
import argparse, random, statistics, time

from nanochat.kindergarten import World, document, programs
from nanochat.tokenizer import SPLIT_PATTERN, Tokenizer


def peer(texts: list[str], vocab_size: int) -> None:
    "The same job by tokenizers"
    from tokenizers import Regex, Tokenizer as HF, decoders, models, pre_tokenizers, trainers
    tokenizer = HF(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN.replace("?+", "?").replace("++", "+")), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))


def seconds(job, *args) -> float:
    start = time.perf_counter()
    job(*args)
    return time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--documents", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    world, rng = World(2000, 1), random.Random(1)
    texts = [document(world, rng, programs(1, False)) for _ in range(args.documents)]
    times = [(seconds(Tokenizer.train, texts, args.vocab_size), seconds(peer, texts, args.vocab_size)) for _ in range(args.rounds)]
    ours, theirs = (statistics.median(t) for t in zip(*times))
    size = sum(map(len, texts)) / 1e6
    print(f"tokenizer training, {size:.1f} MB, vocabulary {args.vocab_size:,}: rustbpe {ours:.2f} s, tokenizers {theirs:.2f} s, ratio {theirs / ours:.1f}")
