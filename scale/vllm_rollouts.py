"""
Rollouts by vLLM: an engine in the trainer's process, which samples what the policy is now.

    roll_out = sampler(args, train, head, dtype)  # in place of shards.generate_gathered

The weights go from the trainer's tensors into the engine's, without a file and without another
process. Where the platform can (CUDA), the engine sleeps outside of `load` and `sample`, and its
memory is the trainer's. On a CPU it can't, and VLLM_CPU_KVCACHE_SPACE says how many GB its cache
of keys and values takes.

Two samplers never agree to the last bit, so rewards must come from the trainer's own scoring
pass (`shards.score_gathered`); the log-probs from here show how far the two are apart.
"""
import importlib.util
import os

import torch
from torch.nn.utils.rnn import pad_sequence

from engine.arguments import positive
from engine.sampler import Rollout
from scale import shards
from tasks.errors import UserError


def start(model, dtype, longest, share=0.4, batch_size=256, **settings):
    """An engine for the checkpoint `model` (folder or Hub id), asleep where it can sleep.

    `longest` is the longest sequence in tokens, `batch_size` how many are sampled at once, and
    `share` the engine's part of the GPU's memory; `settings` are further ones of vllm.LLM.
    Raises UserError without vLLM, and where it can't start.
    """
    # in this process, so that weights need not be sent to another one
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        from vllm import LLM
        from vllm.platforms import current_platform
    except ImportError as error:
        raise UserError(f"vLLM can't be imported here ({error}): pip install vllm") from error
    settings = {
        "dtype": dtype,
        "max_model_len": longest,
        "max_num_seqs": batch_size,
        "gpu_memory_utilization": share,
        "enable_sleep_mode": current_platform.is_sleep_mode_available(),
        "generation_config": "vllm",  # not the checkpoint's top_p, top_k and penalties
        "logprobs_mode": "processed_logprobs",  # after the temperature
        "skip_tokenizer_init": True,  # prompts and responses are token ids
        # half a prompt in a step, and a seed, end in an error on a CPU
        "enable_chunked_prefill": False,
        # on a CPU, compiling takes longer than it saves
        "enforce_eager": current_platform.is_cpu(),
    } | settings
    try:
        engine = LLM(model, **settings)
    except (ValueError, RuntimeError) as error:  # too little memory, a model that it can't run
        raise UserError(f"vLLM: {' '.join(str(error).split())[:300]}") from error
    rest(engine)
    return engine


def rest(engine):
    """Give the memory back until the next `load`: neither weights nor cache are needed again."""
    if engine.model_config.enable_sleep_mode:
        engine.sleep(level=2)


def load(engine, weights):
    """Replace the engine's weights by pairs of name and tensor, as in a checkpoint."""
    if engine.model_config.enable_sleep_mode:
        torch.cuda.empty_cache()  # what torch keeps for itself, the engine can't have
        engine.wake_up(tags=["weights"])
    pairs = ((name, weight.detach()) for name, weight in weights)
    engine.collective_rpc("reload_weights", kwargs={"weights_iterator": pairs})
    engine.apply_model(pack_head)
    if engine.model_config.enable_sleep_mode:
        engine.wake_up(tags=["kv_cache"])
    engine.reset_prefix_cache()  # keys and values of the old weights


def pack_head(model):
    """On a CPU vLLM multiplies by a packed copy of the output head, and where the head is tied
    to the embedding reload_weights leaves the old copy in place: pack it again."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.platforms import current_platform

    for layer in model.modules():
        if isinstance(layer, ParallelLMHead) and current_platform.is_cpu():
            layer.quant_method.process_weights_after_loading(layer)


def sample(engine, prompts, stop, max_new_tokens, temperature, N, seed):
    """Sample N responses to each prompt: -> (responses, logprobs), as engine.sampler.generate does.

    Lists of token ids, a prompt's N responses side by side, the stop token included; and the
    log-probs of the drawn tokens (len(responses), T) in nats under softmax(logits /
    temperature), zeros behind each row's own, float32 on the CPU. The same seed and weights
    draw the same responses.
    """
    from vllm import SamplingParams

    inputs, params = [], []
    for i, prompt in enumerate(prompts):
        inputs.append({"prompt_token_ids": prompt})
        params.append(SamplingParams(
            n=N,
            seed=(seed * len(prompts) + i) * N,  # the k-th of the N adds k to it
            temperature=temperature,
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            repetition_penalty=1.0,
            max_tokens=max_new_tokens,
            stop_token_ids=stop,
            ignore_eos=True,  # no other token ends a response
            logprobs=0,  # of the drawn token alone
            detokenize=False,
        ))
    responses, logprobs = [], []
    for request in engine.generate(inputs, params, use_tqdm=False):
        for output in sorted(request.outputs, key=output_index):
            ids = list(output.token_ids)
            responses.append(ids)
            logprobs.append([step[token].logprob for step, token in zip(output.logprobs, ids)])
    rest(engine)
    rows = [torch.tensor(row) for row in logprobs]
    return responses, pad_sequence(rows, batch_first=True)


def output_index(output):
    return output.index


def add_arguments(add):
    """The flags by which em_rl_fsdp.py samples with vLLM."""
    add("--sampler", choices=["own", "vllm"], default="own", help="what draws the responses; vllm: "
        "see scale/vllm_rollouts.py")
    add("--vllm-memory", type=positive, default=0.4, metavar="X", help="vLLM's share of the GPU's "
        "memory while it samples")


def check(args):
    """Raise UserError where vLLM is not there, or can't give what the reward needs."""
    if args.sampler == "vllm" and not importlib.util.find_spec("vllm"):
        raise UserError("--sampler vllm: needs a package; pip install vllm")
    if args.sampler == "vllm" and args.reward == "self-certainty":
        raise UserError("--reward self-certainty: --sampler vllm gives no mean over the vocabulary")


def sampler(args, train, head, dtype):
    """A function in place of shards.generate_gathered, by an engine of each process on its own GPU
    and with the model's present weights.

    Its entropies and log-probs are the trainer's own, as rewards and gradients need them, by a
    scoring pass. It prints how far vLLM's log-probs of the drawn tokens are from them on average,
    and a warning where that has grown since its first call; without `desc` it prints nothing. It
    draws by torch's seed.
    """
    longest = max(len(problem["ids"]) for problem in train) + args.max_new_tokens
    # vLLM takes the group of all processes for its world, in which each is a group by
    # itself; without the launcher's name all engines would be on the first GPU
    launcher = "external_launcher" if "RANK" in os.environ else None
    engine = start(
        args.model, dtype, longest, share=args.vllm_memory, batch_size=args.rollout_batch,
        distributed_executor_backend=launcher,
    )
    gaps = []  # nats a token

    def generate(model, prompts, stop, max_new_tokens, temperature, N, desc=None, **ignored):
        load(engine, shards.whole_weights(model, dtype))
        responses, sampled = sample(
            engine, prompts, stop, max_new_tokens, temperature, N=N, seed=torch.initial_seed()
        )
        prompts = [prompt for prompt in prompts for _ in range(N)]
        scores = shards.score_gathered(model, head, prompts, responses, temperature, args.budget)
        gap = (sampled.to(model.device) - scores.logprobs)[scores.mask].abs().sum()
        gaps.append(shards.mean({"gap": (gap, scores.mask.sum())})["gap"])
        if desc:
            print(f"vLLM and trainer differ by {gaps[-1]:.1g} nats a token")
        if desc and gaps[-1] > 2 * gaps[0] + 1e-3:
            print(f"warning: that is more than the {gaps[0]:.1g} of the first step")
        return Rollout(
            N=N, V=model.config.get_text_config().vocab_size, responses=responses,
            mean_logprobs=None, **scores._asdict(),
        )

    return generate
