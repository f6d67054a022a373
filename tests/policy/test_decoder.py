"""The decoder against a plain NumPy one, and the sampler against the decoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import EPS, roundings, same_answers, token_noise
from fresh import fresh
from hypothesis import given
from hypothesis import strategies as st

from proxmo_jax.policy.attention import PROMPT_BLOCK
from proxmo_jax.policy.decoder import FEW_LAYERS, READ_STEP, Policy, PolicyConfig, init_params
from proxmo_jax.policy.decoding import PREFILL_TOKENS, decoding_params, part_rows, part_widths, sample
from proxmo_jax.policy.sampling import Decoding, stop_table
from proxmo_jax.policy.sampling import draw as draw_token

CONFIG = PolicyConfig(vocab_size=40, hidden_size=32, intermediate_size=48, head_dim=8, initializer_range=0.3)
TERMS = roundings(CONFIG, 28)
TIE = 2 * TERMS * EPS  # two logits, each off by its rounding


def plain_logits(tokens: np.ndarray) -> np.ndarray:
    """One sequence through the Qwen2 equations, position by position. tokens [L] -> [L, V]."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), fresh(CONFIG))

    def norm(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.rms_norm_eps) * weight

    def rotate(x):
        half = x.shape[-1] // 2
        angle = np.arange(len(x))[:, None, None] * CONFIG.rope.theta ** (-np.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    x = p["embedding"][tokens]
    groups = CONFIG.num_attention_heads // CONFIG.num_key_value_heads
    for i in range(CONFIG.num_hidden_layers):
        layer = jax.tree.map(lambda w: w[i], p["layers"])  # noqa: B023
        y = norm(x, layer["input_norm"]["weight"])
        q, k, v = (
            np.einsum("lw,whd->lhd", y, layer[n]["kernel"]) + layer[n]["bias"] for n in ("query", "key", "value")
        )
        q, k = rotate(q), rotate(k)
        mixed = np.zeros_like(q)
        for head in range(CONFIG.num_attention_heads):
            for at in range(len(tokens)):
                score = k[: at + 1, head // groups] @ q[at, head] / np.sqrt(CONFIG.head_dim)
                weight = np.exp(score - score.max())
                mixed[at, head] = weight @ v[: at + 1, head // groups] / weight.sum()
        x = x + np.einsum("lhd,hdw->lw", mixed, layer["output"]["kernel"])
        y = norm(x, layer["mlp_norm"]["weight"])
        gate = y @ layer["gate"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ layer["up"]["kernel"])) @ layer["down"]["kernel"]
    return norm(x, p["norm"]["weight"]) @ p["embedding"].T


@jax.jit
def padded_logits(params, tokens: jax.Array) -> jax.Array:
    length = tokens.shape[1]
    mask = jnp.tril(jnp.ones((1, length, length), bool))
    return Policy(CONFIG).apply({"params": params}, tokens, jnp.arange(length)[None], mask)[0]


def logits_of(tokens: np.ndarray) -> np.ndarray:
    """Logits of one sequence; what stands after it is not seen."""
    row = np.pad(tokens, (0, 16 - len(tokens)))
    return np.asarray(padded_logits(fresh(CONFIG), row[None]))[0, : len(tokens)]


def test_decoder_equals_plain_numpy():
    tokens = np.random.default_rng(0).integers(0, 40, 9)
    np.testing.assert_allclose(logits_of(tokens), plain_logits(tokens), rtol=0, atol=TIE)


def draw(prompts: list[list[int]], width=8, temperature=1.0, seed=0, stop=3):
    padded = np.zeros((len(prompts), width), np.int32)
    for row, ids in zip(padded, prompts, strict=True):
        row[width - len(ids) :] = ids
    lengths = np.array([len(p) for p in prompts], np.int32)
    return sample(
        fresh(CONFIG), padded, lengths, jax.random.key(seed), jnp.float32(temperature),
        config=CONFIG, decoding=Decoding(6, (stop,)),
    )  # fmt: skip


def test_greedy_sampling_follows_the_decoder_through_the_cache():
    prompts = [[5, 9, 2], [7, 1, 1, 30, 8]]
    answer = draw(prompts, temperature=0.0)
    for prompt, tokens, length in zip(prompts, np.asarray(answer.tokens), np.asarray(answer.lengths), strict=True):
        read = list(prompt)
        for token in tokens[:length]:
            logits = logits_of(np.array(read))[-1]
            assert logits[token] >= logits.max() - TIE
            read.append(int(token))


def test_log_probs_are_those_of_the_policy_and_padding_is_inert():
    prompts = [[5, 9, 2], [7, 1, 1, 30, 8]]
    answer = draw(prompts, width=8)
    wide = draw(prompts, width=16)
    same_answers(wide, answer, key=jax.random.key(0), vocab_size=40, atol=TIE)
    for prompt, tokens, log_probs, length in zip(prompts, *map(np.asarray, answer), strict=True):
        whole = np.array([*prompt, *tokens[:length]])
        mine = jax.nn.log_softmax(logits_of(whole))[np.arange(len(prompt) - 1, len(whole) - 1), whole[len(prompt) :]]
        np.testing.assert_allclose(log_probs[:length], mine, rtol=0, atol=TIE)
        assert not log_probs[length:].any()


@pytest.mark.parametrize("slots", [0, 2])
def test_more_layers_than_are_kept_apart_decode_as_the_policy_reads(slots):
    """Their parameters and cache stay stacks, read in a loop."""
    config = dataclasses.replace(CONFIG, num_hidden_layers=FEW_LAYERS + 1)
    params, lengths = fresh(config), np.array([3, 8, 5, 8, 1], np.int32)
    tokens = np.random.default_rng(1).integers(4, 40, (5, 8))
    prompts = np.where(np.arange(8) >= 8 - lengths[:, None], tokens, 0).astype(np.int32)
    arguments = params, prompts, lengths, jax.random.key(2), jnp.float32(1.0)
    answer = sample(*arguments, config=config, decoding=Decoding(6, (3,)), slots=slots)
    read = jax.jit(lambda *inputs: Policy(config).apply({"params": params}, *inputs)[0][0])
    mask = jnp.tril(jnp.ones((1, 16, 16), bool))
    for prompt, before, tokens, found, after in zip(prompts, lengths, *map(np.asarray, answer), strict=True):
        whole = np.zeros(16, np.int32)
        whole[: before + after] = [*prompt[8 - before :], *tokens[:after]]
        expected = jax.nn.log_softmax(read(whole[None], jnp.arange(16)[None], mask))
        places = np.arange(before - 1, before + after - 1)
        np.testing.assert_allclose(
            found[:after], expected[places, tokens[:after]], rtol=0, atol=2 * roundings(config, 28) * EPS
        )


def test_a_sampled_token_has_the_largest_sum_of_log_prob_and_noise():
    """What `same_answers` calls a tie."""
    prompts = [[5, 9, 2], [7, 1, 1, 30, 8]]
    answer = draw(prompts)
    for row, prompt in enumerate(prompts):
        log_probs = jax.nn.log_softmax(logits_of(np.array(prompt))[-1])
        noisy = log_probs + token_noise(jax.random.key(0), row, 0, 40)
        assert noisy[answer.tokens[row, 0]] >= noisy.max() - TIE


def test_sampling_stops_at_the_stop_token():
    prompts = [[5, 9, 2], [7, 1, 1, 30, 8]]
    first = int(draw(prompts, temperature=0.0).tokens[0, 0])
    assert int(draw(prompts, temperature=0.0, stop=first).lengths[0]) == 1


@pytest.mark.parametrize("width", [8, 16])
def test_one_program_per_shape(width):
    draw([[1, 2], [3]], width=width)
    before = sample._cache_size()
    draw([[4, 2, 9], [5]], width=width, temperature=0.5, seed=9)
    assert sample._cache_size() == before


@pytest.mark.parametrize(("slots", "temperature"), [(1, 0.0), (3, 1.0), (8, 1.0), (19, 0.0)])
def test_rows_given_out_again_answer_as_rows_of_their_own(slots, temperature):
    """Every prompt's answer is what it would be with all of them side by side, or alone."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 9, 19).astype(np.int32)
    prompts = np.where(np.arange(8) >= 8 - lengths[:, None], rng.integers(4, 40, (19, 8)), 0).astype(np.int32)
    params, decoding = fresh(CONFIG), Decoding(12, tuple(range(0, 40, 4)), pad_id=7)
    arguments = (jax.random.key(3), jnp.float32(temperature))
    whole = sample(params, prompts, lengths, *arguments, config=CONFIG, decoding=decoding)
    some = sample(params, prompts, lengths, *arguments, config=CONFIG, decoding=decoding, slots=slots)
    assert len(set(np.asarray(whole.lengths).tolist())) > 4  # rows do stop at different times
    np.testing.assert_array_equal(np.asarray(whole.lengths) == 0, lengths == 0)
    key = jax.random.key(3) if temperature else None
    same_answers(some, whole, key=key, vocab_size=40, atol=TIE)
    table = jnp.asarray(stop_table([chr(65 + i % 26) for i in range(40)], ["Q", "AB"]))
    told = [
        sample(params, prompts, lengths, *arguments, table, config=CONFIG, decoding=decoding, slots=n) for n in (0, 5)
    ]
    same_answers(told[1], told[0], key=key, vocab_size=40, atol=TIE)


@pytest.mark.parametrize(("slots", "real"), [(16, 29), (24, 29)])
def test_padding_takes_no_row_of_a_response_under_way(slots, real):
    """Several rows are given out at once, and fewer prompts wait."""
    lengths = np.where(np.arange(40) < real, 8, 0).astype(np.int32)
    prompts = np.random.default_rng(0).integers(4, 40, (40, 8)).astype(np.int32) * (lengths > 0)[:, None]
    arguments = (fresh(CONFIG), prompts, lengths, jax.random.key(3), jnp.float32(1.0))
    decoding = Decoding(12, (4, 8, 12, 16))
    whole, some = (sample(*arguments, config=CONFIG, decoding=decoding, slots=n) for n in (0, slots))
    assert set(np.asarray(whole.lengths)[:real].tolist()) >= {1, 12}
    same_answers(some, whole, key=jax.random.key(3), vocab_size=40, atol=TIE)


def long_logits(tokens: np.ndarray) -> np.ndarray:
    """Logits of sequences [B, L] of one length through the decoder without a cache."""
    length = tokens.shape[1]
    mask = jnp.tril(jnp.ones((1, length, length), bool))
    return np.asarray(Policy(CONFIG).apply({"params": fresh(CONFIG)}, tokens, jnp.arange(length)[None], mask)[0])


def test_long_prompts_are_read_in_parts_and_a_long_cache_as_far_as_it_is_filled():
    """Parts of two prompts, blocks of `PROMPT_BLOCK` and reads of `READ_STEP` places."""
    rng, width, count = np.random.default_rng(0), 1000, 16
    lengths = rng.integers(1, width + 1, count).astype(np.int32)
    lengths[:2], lengths[-5:] = width, 0
    prompts = np.where(np.arange(width) >= width - lengths[:, None], rng.integers(4, 40, (count, width)), 0)
    assert part_rows(count, width) == 2
    assert width > 3 * PROMPT_BLOCK
    assert width // READ_STEP < 1040 // READ_STEP
    drawn = sample(
        fresh(CONFIG), prompts.astype(np.int32), lengths, jax.random.key(0), jnp.float32(1.0), config=CONFIG,
        decoding=Decoding(40, ()),
    )  # fmt: skip
    assert np.asarray(drawn.lengths).tolist() == [40] * 11 + [0] * 5
    for row in (0, 1, 5, 10):
        whole = np.concatenate([prompts[row, width - lengths[row] :], drawn.tokens[row]])
        log_probs = jax.nn.log_softmax(long_logits(whole[None])[0, -41:-1])[np.arange(40), drawn.tokens[row]]
        limit = 2 * roundings(CONFIG, 1040) * EPS
        np.testing.assert_allclose(drawn.log_probs[row], log_probs, rtol=0, atol=limit)


def test_a_response_reads_a_filled_part_of_the_cache():
    """Greedy responses that grow past several static lengths are those of the decoder without a cache."""
    tokens, lengths = np.array([[5, 9, 2, 8], [0, 7, 1, 30]], np.int32), np.array([4, 3], np.int32)
    decoding = Decoding(2 * READ_STEP + 20, (), greedy=True)
    drawn = sample(fresh(CONFIG), tokens, lengths, jax.random.key(0), jnp.float32(0), config=CONFIG, decoding=decoding)
    limit = 2 * roundings(CONFIG, 280) * EPS
    for prompt, length, answer in zip(tokens, lengths, np.asarray(drawn.tokens), strict=True):
        logits = long_logits(np.concatenate([prompt[-length:], answer])[None])[0, length - 1 : -1]
        assert (logits[np.arange(len(answer)), answer] >= logits.max(-1) - limit).all()


@pytest.mark.parametrize("slots", [0, 4])
def test_prompts_that_are_read_once_answer_as_if_read_for_each(slots):
    """Equal prompts side by side, whose lengths call for parts of every width and for none."""
    rng, width = np.random.default_rng(0), 160
    different = np.array([3, 60, 79, 80, 81, 120, 127, 128, 160, 160], np.int32)
    texts = np.where(np.arange(width) >= width - different[:, None], rng.integers(4, 40, (10, width)), 0)
    each = np.array([0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 7, 7, 7, 8, 8, 9] + [0] * 16)
    prompts, lengths = texts[each].astype(np.int32), different[each]
    prompts[16:], lengths[16:] = 0, 0
    assert part_rows(32, width) == 4  # ten prompts: one part of each width
    assert part_widths(width) == [80, 128, 160]
    arguments = (jax.random.key(3), jnp.float32(1.0), None)
    options = {"config": CONFIG, "decoding": Decoding(12, tuple(range(0, 40, 4)))}
    together = sample(fresh(CONFIG), prompts, lengths, *arguments, **options, slots=slots)
    assert np.asarray(together.lengths)[16:].tolist() == [0] * 16
    assert len({tuple(row) for row in np.asarray(together.tokens)[9:13].tolist()}) == 4  # random numbers of their own
    order = rng.permutation(32)
    mixed = sample(fresh(CONFIG), prompts[order], lengths[order], *arguments, order, **options)
    mixed = jax.tree.map(lambda x: np.asarray(x)[np.argsort(order)], mixed)
    same_answers(together, mixed, key=jax.random.key(3), vocab_size=40, atol=2 * roundings(CONFIG, width + 12) * EPS)


@given(st.integers(1, 300), st.integers(1, 4096))
def test_parts_of_prompts(own, width):
    """They are equal, above the limit only where one prompt is, and no wider than the prompts."""
    rows, widths = part_rows(own, width), part_widths(width)
    assert own % rows == 0
    assert rows == 1 or rows * width <= PREFILL_TOKENS
    assert rows * width <= max(own * width / 8, 1024, width)
    assert widths == sorted(set(widths))
    assert widths[0] > 0
    assert widths[-1] == width


def test_parts_of_narrow_prompts():
    """More than a part, of a width that is no multiple of 16."""
    prompts, lengths = np.full((64, 30), 7, np.int32), np.full(64, 30, np.int32)
    prompts[:, -1] = np.arange(64) % 30 + 4
    options = {"config": CONFIG, "decoding": Decoding(2, (), greedy=True)}
    answers = [
        sample(fresh(CONFIG), prompts[:n], lengths[:n], jax.random.key(0), jnp.float32(0), **options) for n in (64, 30)
    ]
    np.testing.assert_allclose(
        answers[0].log_probs[:30, 0], answers[1].log_probs[:, 0], rtol=0, atol=2 * roundings(CONFIG, 32) * EPS
    )


def test_parameters_are_cast_once_for_many_calls():
    config = dataclasses.replace(CONFIG, dtype="bfloat16", lora_rank=2, num_hidden_layers=1)
    params = init_params(config, jax.random.key(0))
    cast = decoding_params(params, config=config)
    assert {x.dtype for x in jax.tree.leaves(cast)} == {jnp.dtype("bfloat16")}
    assert decoding_params(cast, config=config) is cast
    options = {"config": config, "decoding": Decoding(6, ())}
    prompts, lengths = np.array([[5, 9, 2, 8], [0, 7, 1, 30]], np.int32), np.array([4, 3], np.int32)
    one, other = (sample(p, prompts, lengths, jax.random.key(0), jnp.float32(0), **options) for p in (params, cast))
    # Equal operations on equal numbers, but XLA may fuse a cast into a product and keep what it would round.
    np.testing.assert_array_equal(one.lengths, other.lengths)
    np.testing.assert_allclose(one.log_probs[:, 0], other.log_probs[:, 0], rtol=0, atol=0.05)


def probabilities(decoding, temperature=1.0, count=4000):
    """How often each token is drawn from fixed logits, and the log-prob reported for each."""
    logits = jnp.log(jnp.array([0.4, 0.3, 0.15, 0.1, 0.05]))
    keys = jax.random.split(jax.random.key(1), count)
    tokens, log_probs = jax.vmap(lambda k: draw_token(logits[None], k[None], jnp.float32(temperature), decoding))(keys)
    tokens, log_probs = np.asarray(tokens)[:, 0], np.asarray(log_probs)[:, 0]
    return np.bincount(tokens, minlength=5) / count, {int(t): float(x) for t, x in zip(tokens, log_probs, strict=True)}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_k": 9}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"top_p": 0.6}, [4 / 7, 3 / 7, 0, 0, 0]),  # the word that passes the limit is in
        ({"top_p": 0.01}, [1, 0, 0, 0, 0]),
        ({"top_p": 0.99, "top_k": 3}, [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0]),
    ],
)
def test_top_k_and_top_p(options, expected):
    drawn, log_probs = probabilities(Decoding(1, (), **options))
    np.testing.assert_allclose(drawn, expected, atol=0.03)
    for token, value in log_probs.items():  # of the policy, not of what was left of it: the learner computes that
        np.testing.assert_allclose(value, np.log([0.4, 0.3, 0.15, 0.1, 0.05][token]), rtol=1e-4)


def test_a_low_temperature_sharpens_and_zero_is_greedy():
    drawn, _ = probabilities(Decoding(1, ()), temperature=0.5)
    weights = np.square([0.4, 0.3, 0.15, 0.1, 0.05])
    np.testing.assert_allclose(drawn, weights / weights.sum(), atol=0.03)
    assert probabilities(Decoding(1, ()), temperature=0.0)[0][0] == 1


@given(
    st.lists(st.text("ab<>/ x", max_size=4), min_size=1, max_size=6),
    st.lists(st.text("ab</>", min_size=1, max_size=5), min_size=1, max_size=3),
    st.lists(st.integers(0, 5), max_size=20),
)
def test_the_stop_automaton_finds_what_find_finds(texts, strings, said):
    """Token by token, across their borders, at the first token that completes a string, and for ever after."""
    table = stop_table(texts, strings)
    state, text = 0, ""
    for token in said:
        token %= len(texts)
        state, text = table[state, token], text + texts[token]
        assert (state == len(table) - 1) == any(string in text for string in strings)


def test_answers_end_at_a_stop_string_or_any_stop_token():
    """No two tokens are tied: those drawn here are ahead by 0.026 and more, a logit is off by 1e-4 at most."""
    prompts = [[5, 9, 2], [7, 1, 1, 30, 8]]
    free = draw(prompts, stop=-1)
    texts = [chr(97 + i % 26) + str(i) for i in range(40)]
    second = [texts[t] for t in np.asarray(free.tokens[0, :2])]
    string = second[0][-1] + second[1][0]  # spans two tokens
    padded = np.zeros((2, 8), np.int32)
    for row, ids in zip(padded, prompts, strict=True):
        row[8 - len(ids) :] = ids
    stopped = sample(
        fresh(CONFIG), padded, np.array([3, 5], np.int32), jax.random.key(0), jnp.float32(1.0),
        jnp.asarray(stop_table(texts, [string])), config=CONFIG, decoding=Decoding(6, ()),
    )  # fmt: skip
    for row, length in enumerate(np.asarray(stopped.lengths)):
        said = "".join(texts[t] for t in np.asarray(free.tokens[row, :length]))
        np.testing.assert_array_equal(stopped.tokens[row, :length], free.tokens[row, :length])
        assert string in said or length == 6
        assert string not in "".join(texts[t] for t in np.asarray(free.tokens[row, : length - 1]))
    assert int(stopped.lengths[0]) == 2
    first, third = (int(free.tokens[0, i]) for i in (0, 2))
    either = sample(
        fresh(CONFIG), padded, np.array([3, 5], np.int32), jax.random.key(0), jnp.float32(1.0),
        config=CONFIG, decoding=Decoding(6, (third, first)),
    )  # fmt: skip
    assert int(either.lengths[0]) == 1


def test_stop_strings_must_say_something():
    with pytest.raises(ValueError, match="none of them empty"):
        stop_table(["a"], [""])
