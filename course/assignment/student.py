"""
Nine functions to write, from the entropy of a token to three methods that minimise it.

    python course/assignment/grade.py                  # grades this file, and trains with it
    python course/assignment/grade.py my_student.py    # or another file

README.md, beside this file, has the rules. Logarithms are natural, so entropies and log-probs are
in nats. Shapes: B responses, T tokens, V vocabulary. Numbers keep the dtype of the arguments.
"""
import torch  # noqa: F401


def token_entropy(logits):
    """Entropy of p = softmax(logits), the distribution of the next token: (..., V) -> (...).

        H = - sum over v of  p_v log p_v

    The logits are finite. H is exact and finite even where some p_v is so small that it rounds to
    0. Differentiable.
    """
    raise NotImplementedError


def token_logprobs(logits, ids):
    """Log-prob of each token of B texts but the first: (B, T, V), (B, T) -> (B, T - 1).

        log pi(y_t | y_1 ... y_(t-1))  for t = 2 ... T,    pi = softmax(logits)

    A model has read the token ids and returned the logits. What it returns at a place is about
    the token that follows. Finite even where a probability rounds to 0. Differentiable in the
    logits.
    """
    raise NotImplementedError


def response_mask(ids, stop):
    """True at the tokens of a response, False at the padding behind it: (B, T) -> (B, T).

    Each row of `ids` is a response, filled up to T tokens with padding. `stop` is a list of ids.
    A response goes up to its first stop token, and this token belongs to it, because the model
    has drawn it. A row without a stop token was cut at T tokens, and all of them count. Padding
    can be any id: a stop id, or one that also stands inside a response.
    """
    raise NotImplementedError


def token_reward(entropy, mask):
    """EM-RL's token reward of each response y with |y| tokens: (B, T), (B, T) -> (B,).

        r = - 1/|y|  sum over the tokens of y of  H_t

    `entropy` has H_t where the mask is True, and any numbers elsewhere. A reward is a constant:
    no gradient flows through it, even where `entropy` has one.
    """
    raise NotImplementedError


def sequence_reward(logprobs, mask):
    """EM-RL's sequence reward, a constant, too: (B, T), (B, T) -> (B,).

        r = 1/|y|  sum over the tokens of y of  log pi(y_t)
    """
    raise NotImplementedError


def rloo_advantage(rewards):
    """Each reward against its rivals. A row has the N >= 2 rewards of one prompt: (B, N) -> (B, N).

        A_i = r_i - mean of the other N - 1 rewards of the same prompt
    """
    raise NotImplementedError


def policy_objective(logprobs, advantages, mask, num_tokens):
    """What a micro-batch adds to EM-RL's objective, which is maximised: (B, T), (B,), (B, T),
    number -> scalar. Differentiable in `logprobs`.

        J = 1/num_tokens  sum over the responses i and their tokens t of  A_i log pi(y_i,t)

    An update is split into micro-batches of different sizes, to save memory. B is the size of
    this one, and `num_tokens` counts the response tokens of the whole update.
    """
    raise NotImplementedError


def em_ft_objective(entropy, mask, num_tokens):
    """What a micro-batch adds to EM-FT's objective, which is maximised, too: (B, T), (B, T),
    number -> scalar. Here a gradient does flow through the entropy.

        J = - 1/num_tokens  sum over the responses i and their tokens t of  H_i,t
    """
    raise NotImplementedError


def em_inf_step(logits, m, v, step, lr=0.1, delta=0.3):
    """A step of EM-INF: Adam takes each row downhill in its own entropy H. Three times (B, V) and
    a number -> new logits, m and v: (B, V) each, constants.

        g = dH / dlogits
        m <- 0.9 m + 0.1 g          m_hat = m / (1 - 0.9^step)
        v <- 0.999 v + 0.001 g^2    v_hat = v / (1 - 0.999^step)
        logits <- logits - lr m_hat / (sqrt(v_hat) + 1e-8)

    `step` is 1, 2, ..., and m and v are 0 before step 1. A row whose entropy is below `delta`
    before the step keeps its logits, whatever its m and v do. (The released code adds a small KL
    term, which is left out here.)
    """
    raise NotImplementedError
