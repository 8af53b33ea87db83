"""Draws follow the distribution they should, and depend on nothing but seed, output position and logits."""

import math

import numpy as np
import pytest
import torch

from workers import sampler
from workers.noise import gumbel, mix_, mix_int, split_seed, uniform
from workers.sampler import Draws, Penalties, all_logprobs, best_logprobs, draw, keep, penalise

pytestmark = pytest.mark.usefixtures("one_torch_thread")

CHI_SQUARE_999 = {4: 18.47, 9: 27.88, 19: 43.82, 63: 103.44, 255: 329.92}  # critical values at 0.999 by degrees of freedom


def draws(seeds, positions, *, temperature=1.0, min_p=0.0, top_p=1.0, top_k=0) -> Draws:
    """One row per seed; the other settings are numbers for all rows or one per row."""
    size = len(seeds)
    column = lambda value, dtype: torch.as_tensor(value, dtype=dtype).expand(size)  # noqa: E731
    top_ks = column(top_k, torch.int64)
    return Draws(
        temperature=column(temperature, torch.float32),
        min_p=column(min_p, torch.float32),
        top_p=column(top_p, torch.float32),
        top_k=top_ks,
        seeds=torch.tensor([split_seed(seed) for seed in seeds], dtype=torch.int32),
        positions=column(positions, torch.int32).clone(),
        max_top_k=int(top_ks.max()),
        any_top_p=bool((column(top_p, torch.float32) < 1).any()),
        any_min_p=bool((column(min_p, torch.float32) > 0).any()),
    )


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    expected = probabilities * counts.sum()
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    return float(((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum())


def distribution(logits: np.ndarray, *, temperature=1.0, min_p=0.0, top_p=1.0, top_k=0) -> np.ndarray:
    """What sampling should follow, computed plainly in float64."""
    scaled = logits.astype(np.float64) / temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    p[p < min_p * p.max()] = 0
    if top_k:
        p[p < np.sort(p)[-top_k]] = 0
    p /= p.sum()
    kept, total = np.zeros(len(p), bool), 0.0
    for token in np.argsort(-p, kind="stable"):
        if total >= top_p:
            break
        kept[token] = True
        total += p[token]
    return np.where(kept, p, 0) / p[kept].sum()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"temperature": 1.5, "top_k": 10, "top_p": 0.8, "min_p": 0.05},
    ],
)
def test_draws_follow_the_exact_distribution(settings):
    logits = np.random.RandomState(3).normal(0, 1.5, 20).astype(np.float32)
    num_draws = 20_000
    tokens = draw(torch.from_numpy(logits).expand(num_draws, -1), draws(range(num_draws), 7, **settings))
    expected = distribution(logits, **settings)
    counts = np.bincount(tokens.numpy(), minlength=20)
    degrees = int((expected > 0).sum()) - 1
    critical = degrees + 4.0 * math.sqrt(2 * degrees) + 4  # beyond the 0.9999 quantile for every number of degrees
    assert chi_square(counts, expected) < critical


def test_noise_follows_gumbels_law():
    """Counts of 64 intervals of equal probability, over seeds, positions and tokens alike; and the mean and variance of the law."""
    num_rows, vocab_size = 500, 400
    settings = draws([seed % 50 for seed in range(num_rows)], torch.arange(num_rows) // 50)
    noise = gumbel(sampler._bits(settings.seeds, settings.positions, vocab_size)).double().numpy()
    uniform_SV = np.exp(-np.exp(-noise))
    for view in (uniform_SV.ravel(), uniform_SV[:, 7], uniform_SV[3]):
        counts = np.bincount((view * 64).astype(int), minlength=64)
        assert chi_square(counts, np.full(64, 1 / 64)) < CHI_SQUARE_999[63]
    size = noise.size
    assert abs(noise.mean() - np.euler_gamma) < 4 * math.sqrt(math.pi**2 / 6 / size)
    assert abs(noise.var() - math.pi**2 / 6) < 4 * math.sqrt(4.4 * (math.pi**2 / 6) ** 2 / size)  # its kurtosis is 5.4
    neighbours = np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1], np.corrcoef(noise[:, :-1].ravel(), noise[:, 1:].ravel())[0, 1]
    assert max(map(abs, neighbours)) < 4 / math.sqrt(size)


@pytest.mark.parametrize("seeds", [range(30_000), [seed << 32 for seed in range(30_000)], [(1 << 64) - 1 - seed for seed in range(30_000)]])
def test_seeds_that_differ_little_draw_independently(seeds):
    """Neighbouring seeds, in either word: pairs of 16 x 16 outcomes of a uniform choice at the same position."""
    tokens = draw(torch.zeros(len(seeds), 16), draws(list(seeds), 3)).numpy()
    pairs = np.bincount(tokens[:-1] * 16 + tokens[1:], minlength=256)
    assert chi_square(pairs, np.full(256, 1 / 256)) < CHI_SQUARE_999[255]


def transformers_keep(logits, order, *, temperature=1.0, min_p=0.0, top_p=1.0, top_k=0) -> torch.Tensor:
    """The scores after transformers' own processors, in the given order."""
    from transformers.generation import logits_process as hf

    made = {
        "temperature": hf.TemperatureLogitsWarper(temperature),
        "min_p": hf.MinPLogitsWarper(min_p),
        "top_k": hf.TopKLogitsWarper(top_k or logits.shape[1]),
        "top_p": hf.TopPLogitsWarper(top_p),
    }
    return hf.LogitsProcessorList([made[name] for name in order])(torch.zeros(len(logits), 1, dtype=torch.int64), logits)


VLLM_ORDER = ("temperature", "min_p", "top_k", "top_p")
TRANSFORMERS_ORDER = ("temperature", "top_k", "top_p", "min_p")


@pytest.mark.parametrize("order", [VLLM_ORDER, TRANSFORMERS_ORDER])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 7])
@pytest.mark.parametrize(("min_p", "top_p"), [(0.0, 1.0), (0.1, 1.0), (0.0, 0.8), (0.1, 0.8)])
def test_what_is_kept_is_what_transformers_processors_keep(order, temperature, top_k, min_p, top_p):
    """In vLLM's order always; in transformers' order wherever not both of min-p and top-p are set, which is where the two differ."""
    torch.manual_seed(4)
    logits = torch.randn(200, 60) * 2
    settings = {"temperature": temperature, "top_k": top_k, "min_p": min_p, "top_p": top_p}
    mine = keep(logits, draws(range(200), 0, **settings))
    theirs = transformers_keep(logits, order, **settings)
    if order == TRANSFORMERS_ORDER and min_p and top_p < 1:
        assert ((mine == -math.inf) | (theirs > -math.inf)).all()  # a subset
    else:
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_the_order_of_transformers_is_the_one_assumed_here(checkpoints):
    """As `generate` builds it: penalties, then temperature, then the filters."""
    from transformers import GenerationConfig

    config = GenerationConfig(do_sample=True, repetition_penalty=1.2, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1)
    processors = checkpoints.oracle("llama")._get_logits_processor(config, input_ids_seq_length=1)
    names = [type(processor).__name__ for processor in processors]
    wanted = [f"{name}Logits" for name in ("Temperature", "TopK", "TopP", "MinP")]
    assert names[0].startswith("RepetitionPenalty")
    assert [name.removesuffix("Warper") for name in names[1:]] == wanted


def test_penalties_come_before_everything_else():
    """A penalty moves a token out of the top two; applied after the filters it could not."""
    logits = torch.tensor([[5.0, 4.0, 3.0, -9.0]]).expand(500, -1)
    ones = torch.ones(500)
    counts = torch.tensor([[3, 0, 0, 0]], dtype=torch.int32).expand(500, -1)
    penalties = Penalties(ones, 0 * ones, ones, torch.zeros(500, 4, dtype=torch.bool), counts)
    assert set(draw(penalise(logits, penalties), draws(range(500), 0, top_k=2)).tolist()) == {1, 2}


@pytest.mark.parametrize("temperature", [1e-5, 1.0, 3e38])
@pytest.mark.parametrize("repetition", [1e-38, 1.0, 3e38])
@pytest.mark.parametrize(("top_p", "min_p", "top_k"), [(1.0, 0.0, 0), (1e-30, 1.0, 1), (0.5, 1e-30, 1 << 30)])
def test_settings_at_the_ends_of_their_ranges_draw_valid_tokens(temperature, repetition, top_p, min_p, top_k):
    torch.manual_seed(5)
    logits = torch.randn(6, 40) * 10
    zeros = torch.zeros(6)
    seen = torch.rand(6, 40) < 0.7
    penalised = penalise(logits, Penalties(zeros + repetition, zeros, zeros, seen, torch.zeros(6, 40, dtype=torch.int32)))
    tokens = draw(penalised, draws(range(6), 0, temperature=temperature, top_p=top_p, min_p=min_p, top_k=min(top_k, 40)))
    assert ((tokens >= 0) & (tokens < 40)).all()


def test_positions_of_one_seed_are_independent_draws():
    """Along one request, and pairs of neighbours: 16 x 16 outcomes of a uniform choice."""
    num_draws = 40_000
    tokens = draw(torch.zeros(num_draws, 16), draws([5] * num_draws, torch.arange(num_draws))).numpy()
    pairs = np.bincount(tokens[:-1] * 16 + tokens[1:], minlength=256)
    assert chi_square(pairs, np.full(256, 1 / 256)) < CHI_SQUARE_999[255]


def test_draws_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    logits = torch.randn(40, 1000)
    seeds, positions = list(range(100, 140)), torch.arange(40)
    settings = {"temperature": torch.linspace(0, 2, 40), "top_k": torch.arange(40) * 3, "top_p": torch.linspace(0.3, 1, 40)}
    together = draw(logits, draws(seeds, positions, **settings))
    order = torch.randperm(40)
    shuffled = draw(
        logits[order],
        draws([seeds[i] for i in order.tolist()], positions[order], **{name: value[order] for name, value in settings.items()}),
    )
    assert torch.equal(shuffled, together[order])
    alone = [
        draw(logits[i : i + 1], draws([seeds[i]], int(positions[i]), **{name: value[i] for name, value in settings.items()}))
        for i in range(40)
    ]
    assert torch.equal(torch.cat(alone), together)
    assert len(set(draw(logits[:1].expand(40, -1), draws(seeds, 0, temperature=2.0)).tolist())) > 20
    here, there = (draw(logits, draws(seeds, place, temperature=2.0)) for place in (positions, positions + 1))
    assert not torch.equal(here, there)


def test_both_words_of_the_seed_count():
    logits = torch.zeros(3, 5000)
    assert len(set(draw(logits, draws([1, 1 << 32, (1 << 32) + 1], 0)).tolist())) == 3
    assert split_seed((1 << 64) - 1) == (-1, -1)


def test_greedy_rows_take_the_largest_whatever_the_filters():
    torch.manual_seed(1)
    logits = torch.randn(8, 50)
    tokens = draw(logits, draws(range(8), 0, temperature=0.0, top_k=3, top_p=0.5, min_p=0.3))
    assert torch.equal(tokens, logits.argmax(-1))


def test_ties_at_the_kth_place_stay():
    logits = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0]]).expand(3000, -1)
    assert set(draw(logits, draws(range(3000), 0, top_k=2)).tolist()) == {0, 1, 2, 3}


def test_hash_is_the_same_in_torch_and_in_plain_integers():
    values = [0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, *np.random.RandomState(0).randint(0, 1 << 32, 200, np.uint32).tolist()]
    hashed = mix_(torch.tensor([split_seed(value)[0] for value in values], dtype=torch.int32))
    assert [value & 0xFFFFFFFF for value in hashed.tolist()] == [mix_int(value) for value in values]
    assert len({mix_int(value) for value in range(100_000)}) == 100_000


def test_gumbel_noise_reaches_both_tails():
    """Against float64 at the ends and the middle of the 32 bits."""
    bits = [0, 1, 1000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF, 0x12345678, 0xF2345678]
    noise = gumbel(torch.tensor([split_seed(value)[0] for value in bits], dtype=torch.int32))
    exact = [-math.log(-math.log((value + 0.5) / 2**32)) for value in bits]
    np.testing.assert_allclose(noise.numpy(), exact, rtol=2e-6, atol=2e-6)
    assert float(uniform(torch.tensor([-(1 << 31), (1 << 31) - 1], dtype=torch.int32)).abs().max()) <= 1.0


def test_penalties_are_those_of_vllm():
    """Repetition over prompt and output, on the sign of the logit; frequency and presence over the output."""
    logits = torch.tensor([[2.0, -2.0, 4.0, -4.0, 1.0]])
    penalties = Penalties(
        repetition=torch.tensor([2.0]),
        presence=torch.tensor([0.25]),
        frequency=torch.tensor([0.5]),
        in_prompt=torch.tensor([[True, True, False, False, False]]),
        output_counts=torch.tensor([[0, 0, 3, 1, 0]], dtype=torch.int32),
    )
    expected = [1.0, -4.0, 4.0 / 2 - 3 * 0.5 - 0.25, -4.0 * 2 - 0.5 - 0.25, 1.0]
    np.testing.assert_allclose(penalise(logits, penalties)[0].numpy(), expected)


def test_logprobs_are_those_of_the_raw_logits():
    torch.manual_seed(2)
    logits = torch.randn(3, 10)
    exact = logits.log_softmax(-1)
    rows = best_logprobs(logits, torch.tensor([4, 5, 6]), 2)()
    for row, chosen in enumerate((4, 5, 6)):
        best = exact[row].topk(2)
        assert [token for token, _ in rows[row]] == [chosen, *best.indices.tolist()]
        np.testing.assert_allclose([value for _, value in rows[row]], [exact[row, chosen], *best.values], rtol=1e-6)
    assert best_logprobs(logits, torch.tensor([4, 5, 6]), 0)()[0] == [(4, pytest.approx(float(exact[0, 4])))]
    assert all_logprobs(logits)() == exact.numpy().astype("<f4").tobytes()
