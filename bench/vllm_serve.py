"""
EM-INF in vLLM's server: does it leave other requests alone, and do what em_inf.py does?

    python bench/vllm_serve.py                           # the tiny model
    python bench/vllm_serve.py --model FOLDER --seeds 0  # without the accuracies

64 requests at once, to a server with the processor and to one without: first greedy ones, half
of them with EM-INF and a delta each; then accuracy at T = 1 and 10 steps, four settings side by
side, to be held against em_inf.py --decode sample,em-inf --delta DELTA.
"""
import argparse
import json
import os
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # in place of bench/, whose em_inf.py would be imported
from transformers import AutoTokenizer  # noqa: E402

from tasks.answers import grade  # noqa: E402
from tasks.problems import load_problems  # noqa: E402
from tasks.prompts import encode_problem  # noqa: E402

PLAIN, OURS = 8765, 8766  # ports
DELTAS = [None, 0.1, 0.3, 0.5]  # None: no EM-INF


def serve(port, model):
    # what `vllm serve` runs, which the package for CPUs can't start
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--served-model-name", "model", "--port", str(port), "--dtype", "float32"]
    # in chunks, a prompt with a seed ends the engine on a CPU
    command += ["--generation-config", "vllm", "--no-enable-chunked-prefill"]
    if port == OURS:
        command += ["--logits-processors", "scale.em_inf_vllm:EMInfVLLM"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "VLLM_LOGGING_LEVEL": "ERROR"}
    server = subprocess.Popen(command, env=env)
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"http://localhost:{port}/health")
            return server
        except OSError:
            time.sleep(1)
    sys.exit(f"vllm_serve.py: the server on port {port} has ended")


def ask(port, prompts, deltas, temperature, seed=0):  # -> texts
    url = f"http://localhost:{port}/v1/completions"
    header = {"Content-Type": "application/json"}

    def ask_one(i):
        body = {"model": "model", "prompt": prompts[i], "max_tokens": 64, "seed": seed + i}
        body["temperature"] = temperature
        if deltas[i] is not None:
            body["vllm_xargs"] = {"em_inf.delta": deltas[i], "em_inf.steps": 10}
        request = urllib.request.Request(url, json.dumps(body).encode(), header)
        return json.load(urllib.request.urlopen(request))["choices"][0]["text"]

    with ThreadPoolExecutor(64) as pool:
        return list(pool.map(ask_one, range(len(prompts))))


parser = argparse.ArgumentParser()
parser.add_argument("--model", default=str(ROOT / "tiny/base"))
parser.add_argument("--seeds", type=int, default=3)
args = parser.parse_args()
tokenizer = AutoTokenizer.from_pretrained(args.model)
problems = load_problems(str(ROOT / "tiny/test.jsonl"))
prompts = [encode_problem(tokenizer, problem) for problem in problems]
servers = []
try:
    for port in PLAIN, OURS:
        servers.append(serve(port, args.model))
    mixed = [None if i % 2 else 0.01 * i for i in range(64)]
    right = ask(PLAIN, prompts[:64], [None] * 64, temperature=0.0)
    got = ask(OURS, prompts[:64], mixed, temperature=0.0)
    same = sum(a == b for a, b in zip(right[1::2], got[1::2]))
    print(f"greedy: {same} of 32 untouched requests are as without the processor", flush=True)
    for seed in range(1, args.seeds + 1):
        deltas = [delta for delta in DELTAS for _ in problems]
        verdicts = grade(4 * problems, ask(OURS, 4 * prompts, deltas, 1.0, 10_000 * seed))
        for n, delta in enumerate(DELTAS):
            share = mean(verdicts[n * len(problems) : (n + 1) * len(problems)])
            print(f"T = 1, seed {seed}, delta {delta}: {share:.1%} right", flush=True)
finally:
    for server in servers:
        server.terminate()
        server.wait()
