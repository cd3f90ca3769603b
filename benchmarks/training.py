"""Training speed against transformers' NanoChatForCausalLM with torch.optim.AdamW: the same sizes, the same random tokens, in turns, each in a process of its own.

python benchmarks/training.py [--depth 4] [--width 256] [--sequence 512] [--vocab-size 8192] [--rows 16] [--steps 12] [--rounds 3] [--record FILE.json]

Ours is what the stages run: compiled, Muon and AdamW, the chunked loss, in the dtype that compute_init picks. The peer runs in float32 and in
bfloat16 autocast, eager and compiled; the ratio is to the fastest of the four. Memory is what the process used at its peak beyond its imports.
"""
import argparse, json, os, statistics, subprocess, sys, time
from pathlib import Path


def peak_memory() -> float:
    "MB of this process at its peak"
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(step, args, before: float) -> dict:
    "Tokens a second of `step`, after two steps to warm up, which compile"
    start = time.perf_counter()
    for _ in range(2): step()
    warm, start = time.perf_counter() - start, time.perf_counter()
    for _ in range(args.steps): step()
    return dict(tokens_per_second=args.rows * args.sequence * args.steps / (time.perf_counter() - start), warm_up_seconds=warm, memory_mb=peak_memory() - before)


def ours(args, dtype: str) -> dict:
    import torch
    from nanochat.common import compute_init
    from nanochat.gpt import GPT, GPTConfig
    from nanochat.muon import make_optimizers
    from nanochat.train import compiled
    compute, before = compute_init("cpu", dtype), peak_memory()
    config = GPTConfig(sequence_len=args.sequence, vocab_size=args.vocab_size, n_layer=args.depth, n_head=args.width // 128 or 1, n_kv_head=args.width // 128 or 1, n_embd=args.width)
    model = GPT(config, compute_dtype=compute.dtype)
    forward, optimizers = compiled(model, compute.device), make_optimizers(model)
    ids = torch.randint(args.vocab_size, (args.rows, args.sequence + 1))
    def step():
        forward(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()).backward()
        for optimizer in optimizers: optimizer.step(); optimizer.zero_grad(set_to_none=True)
    return timed(step, args, before)


def peer(args, autocast: bool, compile: bool) -> dict:
    import torch
    from transformers import NanoChatConfig, NanoChatForCausalLM
    torch.manual_seed(0)
    before = peak_memory()
    config = NanoChatConfig(vocab_size=args.vocab_size, hidden_size=args.width, intermediate_size=4 * args.width, num_hidden_layers=args.depth,
                            num_attention_heads=args.width // 128 or 1, num_key_value_heads=args.width // 128 or 1, max_position_embeddings=args.sequence, use_cache=False)
    model = NanoChatForCausalLM(config)
    forward, optimizer = torch.compile(model, dynamic=False) if compile else model, torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(args.vocab_size, (args.rows, args.sequence + 1))
    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast): logits = forward(input_ids=ids[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step(); optimizer.zero_grad(set_to_none=True)
    return timed(step, args, before)


JOBS = {
    "nanochat": lambda args: ours(args, "auto"),
    "nanochat float32": lambda args: ours(args, "float32"),
    "transformers float32": lambda args: peer(args, False, False),
    "transformers float32 compiled": lambda args: peer(args, False, True),
    "transformers bfloat16": lambda args: peer(args, True, False),
    "transformers bfloat16 compiled": lambda args: peer(args, True, True),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in dict(depth=4, width=256, sequence=512, vocab_size=8192, rows=16, steps=12, rounds=3, threads=os.cpu_count()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    parser.add_argument("--record", help="write the medians to this JSON file")
    parser.add_argument("--job", help="run one job in this process and print its result")
    args = parser.parse_args()
    if args.job: print(json.dumps(JOBS[args.job](args))); return
    environment, results = os.environ | dict(OMP_NUM_THREADS=str(args.threads)), {name: [] for name in JOBS}
    for _ in range(args.rounds):
        for name in JOBS:
            done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--job", name], capture_output=True, text=True, env=environment)
            if done.returncode: raise SystemExit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
            results[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
    medians = {name: {key: round(statistics.median(result[key] for result in found), 1) for key in found[0]} for name, found in results.items()}
    best = max((name for name in medians if name.startswith("transformers")), key=lambda name: medians[name]["tokens_per_second"])
    for name, row in medians.items():
        print(f"{name:<32} {row['tokens_per_second']:9,.0f} tokens/s   warm-up {row['warm_up_seconds']:5.1f} s   {row['memory_mb']:6,.0f} MB")
    ratio = medians["nanochat"]["tokens_per_second"] / medians[best]["tokens_per_second"]
    print(f"nanochat is {ratio:.2f} times as fast as the best of the peer ({best}), with {medians['nanochat']['memory_mb'] / medians[best]['memory_mb']:.2f} times its memory")
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    cpu = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    settings = {key: value for key, value in vars(args).items() if key not in ("record", "job")}
    if args.record: Path(args.record).write_text(json.dumps(dict(settings=settings, cpu=cpu, medians=medians, best_peer=best, ratio=round(ratio, 2)), indent=1) + "\n")


if __name__ == "__main__": main()
