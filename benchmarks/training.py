"""Training speed against transformers' NanoChatForCausalLM with torch.optim.AdamW: the same sizes, the same random tokens, in turns, each in a process of its own.

python benchmarks/training.py [--depth 4] [--width 256] [--sequence 512] [--vocab-size 8192] [--rows 16] [--steps 12] [--rounds 3] [--threads N] [--processes 1] [--record FILE.json]

Ours is what the stages run: compiled, Muon and AdamW, the chunked loss, in the dtype that compute_init picks. The peer runs in float32 and in
bfloat16 autocast, eager and compiled; the ratio is to the fastest of the four. Memory is what the process used at its peak beyond its imports;
processor seconds count all threads of a process, and tell more than the clock where other work runs beside. With --processes 2, two processes that share
the rows of a step are compared with one instead; each has as many threads as that one, by default its share of the cores.
"""
import argparse, json, os, socket, statistics, subprocess, sys, time
from pathlib import Path


def peak_memory() -> float:
    "MB of this process at its peak"
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(step, args, before: float) -> dict:
    "Tokens a second of `step`, after two steps to warm up, which compile"
    start = time.perf_counter()
    for _ in range(2): step()
    warm, start, processor = time.perf_counter() - start, time.perf_counter(), time.process_time()
    for _ in range(args.steps): step()
    return dict(tokens_per_second=args.rows * args.sequence * args.steps / (time.perf_counter() - start), warm_up_seconds=warm, memory_mb=peak_memory() - before,
                processor_seconds=(time.process_time() - processor) / args.steps)


def ours(args, dtype: str) -> dict:
    import torch
    from nanochat.common import compute_init
    from nanochat.gpt import GPT, GPTConfig
    from nanochat.muon import make_optimizers, step_together
    from nanochat.train import compiled
    compute, before = compute_init("cpu", dtype), peak_memory()
    torch.set_num_threads(args.threads)
    config = GPTConfig(sequence_len=args.sequence, vocab_size=args.vocab_size, n_layer=args.depth, n_head=args.width // 128 or 1, n_kv_head=args.width // 128 or 1, n_embd=args.width)
    model = GPT(config, compute_dtype=compute.dtype)
    forward, optimizers = compiled(model, compute.device), make_optimizers(model)
    ids, stepping = torch.randint(args.vocab_size, (args.rows // compute.world_size, args.sequence + 1)), []
    def step():
        forward(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()).backward()
        start = time.perf_counter()
        step_together(optimizers)
        stepping.append(time.perf_counter() - start)
        for optimizer in optimizers: optimizer.zero_grad(set_to_none=True)
    return timed(step, args, before) | dict(optimizer_seconds=statistics.median(stepping[2:]))


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


def run(name: str, args, processes: int = 1) -> dict:
    "The job's result, from a process of its own; from the first of them if there are several"
    with socket.socket() as probe: probe.bind(("127.0.0.1", 0)); port = probe.getsockname()[1]
    environment = os.environ | dict(OMP_NUM_THREADS=str(args.threads), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    command = [sys.executable, __file__, *sys.argv[1:], "--job", name]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment | dict(RANK=str(rank), LOCAL_RANK=str(rank))) for rank in range(processes)]
    for job, (said, wrong) in [(job, job.communicate()) for job in started][::-1]:
        if job.returncode: raise SystemExit(f"{name}: {wrong.strip().splitlines()[-1]}")
    return json.loads(said.strip().splitlines()[-1])


def measured(jobs: dict, args) -> dict:
    "Medians of the rounds: name → measurements; the jobs, name → (job, processes), take turns"
    results = {name: [] for name in jobs}
    for _ in range(args.rounds):
        for name, (job, processes) in jobs.items(): results[name].append(run(job, args, processes))
    medians = {name: {key: round(statistics.median(result[key] for result in found), 4) for key in found[0]} for name, found in results.items()}
    for name, row in medians.items():
        print(f"{name:<32} {row['tokens_per_second']:9,.0f} tokens/s   warm-up {row['warm_up_seconds']:5.1f} s   {row['memory_mb']:6,.0f} MB   "
              f"{row['processor_seconds']:.3f} processor seconds a step" + (f", optimizers {row['optimizer_seconds']:.3f} s" if "optimizer_seconds" in row else ""))
    return medians


def compare_peers(args) -> dict:
    "Ours and every form of the peer: what goes into the record"
    medians = measured({name: (name, 1) for name in JOBS}, args)
    best = max((name for name in medians if name.startswith("transformers")), key=lambda name: medians[name]["tokens_per_second"])
    ratio = medians["nanochat"]["tokens_per_second"] / medians[best]["tokens_per_second"]
    print(f"nanochat is {ratio:.2f} times as fast as the best of the peer ({best}), with {medians['nanochat']['memory_mb'] / medians[best]['memory_mb']:.2f} times its memory")
    return dict(medians=medians, best_peer=best, ratio=round(ratio, 2))


def compare_processes(args) -> dict:
    "One process and several: what goes into the record"
    medians = measured({"one process": ("nanochat", 1), f"{args.processes} processes": ("nanochat", args.processes)}, args)
    one, several = medians.values()
    ratio = several["tokens_per_second"] / one["tokens_per_second"]
    print(f"{args.processes} processes are {ratio:.2f} times as fast as one, with {args.threads} threads each")
    return dict(medians=medians, ratio=round(ratio, 2))


def cpu_features() -> list[str]:
    "What the processor says it has for fast products of matrices; empty where there is no /proc"
    path = Path("/proc/cpuinfo")
    flags = path.read_text().split() if path.exists() else []
    return [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in dict(depth=4, width=256, sequence=512, vocab_size=8192, rows=16, steps=12, rounds=3, processes=1).items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    parser.add_argument("--threads", type=int, help="of each process; by default the cores, divided by the processes")
    parser.add_argument("--record", help="write the medians to this JSON file")
    parser.add_argument("--job", help="run one job in this process and print its result")
    args = parser.parse_args()
    args.threads = args.threads or max(1, os.cpu_count() // args.processes)
    if args.job: print(json.dumps(JOBS[args.job](args)), flush=True); os._exit(0)  # a thread of gloo's may abort the usual end
    found = compare_peers(args) if args.processes == 1 else compare_processes(args)
    settings = {key: value for key, value in vars(args).items() if key not in ("record", "job")}
    if args.record: Path(args.record).write_text(json.dumps(dict(settings=settings, cpu=cpu_features()) | found, indent=1) + "\n")


if __name__ == "__main__": main()
