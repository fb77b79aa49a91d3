"""Generation: cached and recomputed, greedy, sampled and by beam search."""

import itertools

import pytest
import torch

from fastattn.models.generation import filter_logits, generate

MODES = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "long beam": {"num_beams": 4, "length_penalty": 2.0},
    "sample": {"do_sample": True},
    "filtered": {"do_sample": True, "temperature": 1.5, "top_k": 9, "top_p": 0.9},
}


def _sharpen(model):
    """Makes distributions less even, so that no two continuations nearly tie."""
    with torch.no_grad():
        model.output.weight *= 6
    return model


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm_first", [False, True])
def test_cached_equals_recomputed(small, tokens, mode, norm_first):
    model = _sharpen(small(norm_first=norm_first, positions="learned").double())
    src = tokens(4, 8)
    src[1, 5:] = src[2, :3] = 0
    results = [
        model.generate(
            src, bos_id=1, eos_id=2, max_new_tokens=12, cache=cache,
            generator=torch.Generator().manual_seed(7), **MODES[mode],
        )
        for cache in ("static", "paged", "none")
    ]  # fmt: skip
    assert results[0].equal(results[1]) and results[0].equal(results[2])
    assert 1 <= results[0].shape[1] <= 12


def test_greedy_takes_the_most_probable(preferred, small, tokens):
    model = _sharpen(small())
    src = tokens(3, 8)
    src[1, 5:] = 0
    out = model.generate(src, bos_id=1, eos_id=None, max_new_tokens=10)
    assert out.shape == (3, 10)
    tgt = torch.cat([torch.ones(3, 1, dtype=torch.long), out[:, :-1]], 1)
    assert out.equal(model(src, tgt).argmax(-1))


@pytest.mark.parametrize("mode", MODES)
def test_a_row_does_not_depend_on_its_batch(small, tokens, mode):
    if MODES[mode].get("do_sample"):
        pytest.skip("rows share the generator")
    model = _sharpen(small().double())
    src = tokens(4, 8)
    src[1, 5:] = 0
    together = model.generate(src, bos_id=1, eos_id=2, max_new_tokens=9, **MODES[mode])
    for row, expected in zip(src, together, strict=True):
        alone = model.generate(
            row[row != 0][None], bos_id=1, eos_id=2, max_new_tokens=9, **MODES[mode]
        )
        assert alone[0].equal(expected[: alone.shape[1]])
        assert expected[alone.shape[1] :].eq(0).all()


class Table:
    """A decoder whose next logits are a table's row for the last two tokens."""

    def __init__(self, vocab_size, spread=2.0, batch=3, seed=0):
        generator = torch.Generator().manual_seed(seed)
        shape = (batch, vocab_size, vocab_size, vocab_size)
        self.logits = torch.randn(shape, generator=generator, dtype=torch.float64) * spread
        self.rows = torch.arange(batch)
        self.tokens = torch.zeros(batch, 1, dtype=torch.long)

    def step(self, tokens):
        self.tokens = torch.cat([self.tokens, tokens], 1)
        return self.logits[self.rows, self.tokens[:, -2], self.tokens[:, -1]]

    def reorder(self, rows):
        self.rows, self.tokens = self.rows[rows], self.tokens[rows]

    def score(self, row, sequence):
        """Log probability of a sequence after the prompt [1]."""
        logp = self.logits.log_softmax(-1)
        history = [0, 1, *sequence]
        return sum(
            logp[row, a, b, c].item()
            for a, b, c in zip(history, history[1:], sequence, strict=False)
        )


def _prompt(batch=3):
    return torch.ones(batch, 1, dtype=torch.long)


def _hypotheses(vocab_size, longest, eos):
    """Every sequence that ends with eos, or has no eos and the full length."""
    others = [token for token in range(vocab_size) if token != eos]
    for length in range(longest):
        for head in itertools.product(others, repeat=length):
            yield [*head, eos]
    yield from (list(full) for full in itertools.product(others, repeat=longest))


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 3.0, -1.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_wide_beam_finds_the_best_of_all(length_penalty, seed):
    vocab_size, longest, eos = 4, 4, 2
    table = Table(vocab_size, seed=seed)
    out = generate(
        table, _prompt(), eos_id=eos, pad_id=0, max_new_tokens=longest, num_beams=4**4,
        length_penalty=length_penalty,
    )  # fmt: skip
    for row in range(3):
        best = max(
            _hypotheses(vocab_size, longest, eos),
            key=lambda s, row=row: table.score(row, s) / len(s) ** length_penalty,
        )
        assert out[row, : len(best)].tolist() == best
        assert out[row, len(best) :].eq(0).all()


def _plain_beam_search(table, row, eos, longest, beams, length_penalty):
    """The definition, one row, in lists, never stopping early."""
    vocab_size = table.logits.shape[-1]
    live, ended = [[]], []
    for length in range(1, longest + 1):
        ranked = sorted(
            ([*head, token] for head in live for token in range(vocab_size)),
            key=lambda s: -table.score(row, s),
        )
        ended += [s for s in ranked[:beams] if s[-1] == eos or length == longest]
        live = [s for s in ranked if s[-1] != eos][:beams]
    return max(ended, key=lambda s: table.score(row, s) / len(s) ** length_penalty)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -0.5])
@pytest.mark.parametrize("beams", [2, 3, 5])
def test_beam_search_is_its_definition(beams, length_penalty):
    for seed in range(3):
        table = Table(6, seed=seed)
        table.logits[..., 2] += 1.0
        out = generate(
            table, _prompt(), eos_id=2, pad_id=0, max_new_tokens=7, num_beams=beams,
            length_penalty=length_penalty,
        )  # fmt: skip
        for row in range(3):
            expected = _plain_beam_search(table, row, 2, 7, beams, length_penalty)
            expected += [0] * (out.shape[1] - len(expected))
            assert out[row].tolist() == expected


def test_a_finished_hypothesis_is_kept_and_ends_the_search():
    table = Table(5, spread=0.0, batch=1)
    table.logits[..., 2] = 3.0
    out = generate(
        table, _prompt(1), eos_id=2, pad_id=0, max_new_tokens=50, num_beams=3, length_penalty=0.0
    )
    assert out.tolist() == [[2]]
    assert table.tokens.shape[1] <= 4


def test_stops_when_all_rows_ended():
    table = Table(5, spread=0.0, batch=2)
    table.logits[..., 3] = 1.0
    table.logits[0, 1, 3, 2] = 5.0  # row 0: 3, 2, end
    table.logits[1, 3, 3, 2] = 5.0  # row 1: 3, 3, 2, end
    out = generate(table, _prompt(2), eos_id=2, pad_id=4, max_new_tokens=20)
    assert out.tolist() == [[3, 2, 4], [3, 3, 2]]


def _allowed(logits, temperature, top_k, top_p):
    """The definition: walk down from the most probable."""
    p = (logits / temperature).softmax(-1)
    order = sorted(range(len(p)), key=lambda token: -p[token].item())[:top_k]
    total, kept, mass = sum(p[token].item() for token in order), set(), 0.0
    for token in order:
        kept.add(token)
        mass += p[token].item() / total
        if mass >= top_p:
            break
    return kept


@pytest.mark.parametrize("top_k", [1, 3, 40, 100])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_filters_are_their_definition(top_k, top_p, temperature):
    logits = torch.randn(5, 40, dtype=torch.float64) * 2
    filtered = filter_logits(logits, temperature, top_k, top_p)
    for before, after in zip(logits, filtered, strict=True):
        kept = (after > -torch.inf).nonzero()[:, 0].tolist()
        assert set(kept) == _allowed(before, temperature, top_k, top_p)
        torch.testing.assert_close(after[kept], before[kept] / temperature)


def test_draws_follow_the_distribution():
    table = Table(6, batch=1)
    table.logits = table.logits.expand(4000, -1, -1, -1)
    table.rows, table.tokens = torch.arange(4000), torch.zeros(4000, 1, dtype=torch.long)
    out = generate(
        table, _prompt(4000), eos_id=None, pad_id=0, max_new_tokens=1, do_sample=True,
        temperature=2.0, top_k=4,
    )  # fmt: skip
    expected = filter_logits(table.logits[0, 0, 1][None], 2.0, 4).softmax(-1)[0]
    torch.testing.assert_close(
        out[:, 0].bincount(minlength=6) / 4000, expected.float(), rtol=0, atol=0.04
    )


def test_sampling_obeys_its_seed(small, tokens):
    model = small()
    src = tokens(3, 6)

    def draw(**seeded):
        return model.generate(
            src, bos_id=1, eos_id=None, max_new_tokens=12, do_sample=True, **seeded
        )

    def generator(seed):
        return {"generator": torch.Generator().manual_seed(seed)}

    assert draw(**generator(1)).equal(draw(**generator(1)))
    assert not draw(**generator(1)).equal(draw(**generator(2)))
    torch.manual_seed(3)
    first = draw()
    torch.manual_seed(3)
    assert draw().equal(first)


@pytest.mark.parametrize("mode", MODES)
def test_empty_batch_and_one_token(small, tokens, mode):
    model = small()
    none = torch.empty(0, 5, dtype=torch.long)
    assert model.generate(
        none, bos_id=1, eos_id=2, max_new_tokens=3, **MODES[mode]
    ).shape[0] == 0  # fmt: skip
    one = model.generate(tokens(2, 5), bos_id=1, eos_id=2, max_new_tokens=1, **MODES[mode])
    assert one.shape == (2, 1)


def test_int32_tokens(small, tokens):
    model = _sharpen(small())
    src = tokens(2, 5)
    for options in MODES.values():
        out = [
            model.generate(
                s, bos_id=1, eos_id=2, max_new_tokens=5, **options,
                generator=torch.Generator().manual_seed(0),
            )
            for s in (src, src.int())
        ]  # fmt: skip
        assert out[1].dtype == torch.int32 and out[0].equal(out[1].long())


@pytest.mark.parametrize(
    "name, options",
    [
        ("max_new_tokens", {"max_new_tokens": 0}),
        ("max_new_tokens", {"max_new_tokens": 25}),
        ("num_beams", {"num_beams": 0}),
        ("num_beams", {"num_beams": 2, "do_sample": True}),
        ("num_beams", {"length_penalty": 2.0}),
        ("temperature", {"do_sample": True, "temperature": 0.0}),
        ("top_k", {"do_sample": True, "top_k": 0}),
        ("top_p", {"do_sample": True, "top_p": 1.5}),
        ("min_p", {"do_sample": True, "min_p": 0.0}),
        ("repetition_penalty", {"repetition_penalty": 0.0}),
        ("num_beams", {"num_beams": 2, "repetition_penalty": 2.0}),
        ("min_new_tokens", {"min_new_tokens": -1}),
        ("cache", {"cache": "dynamic"}),
        ("do_sample", {"top_k": 3}),
        ("do_sample", {"temperature": 0.5}),
        ("bos_id", {"bos_id": 19}),
        ("eos_id", {"eos_id": -1}),
        ("src", {"src": torch.ones(1, 30, dtype=torch.long)}),
    ],
)
def test_wrong_arguments_are_refused(small, tokens, name, options):
    model = small()
    arguments = {"src": tokens(1, 4), "bos_id": 1, "eos_id": 2, "max_new_tokens": 4, **options}
    with pytest.raises(ValueError, match=f"^{name}: expected .* got "):
        model.generate(**arguments)
