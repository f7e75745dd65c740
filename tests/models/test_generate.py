"""Generated texts: with a cache as without, drawn as asked for, and worth reading."""

from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pockjax.data import load_tokenizer
from pockjax.models import Llama, generate, load, load_llama, to_scanned
from tests.models.llama_files import CONFIG


@pytest.fixture(scope="module")
def model() -> Llama:
    # Large weights, so that the likeliest token changes from place to place.
    model = Llama(replace(CONFIG, scanned=True), rngs=nnx.Rngs(0))
    nnx.update(model, jax.tree.map(lambda x: 2.5 * x, nnx.state(model)))
    return model


def without_cache(model: Llama, prompt: np.ndarray, count: int) -> list[int]:
    """The likeliest token, again and again, reading everything from the start each time."""
    total = len(prompt) + count
    predict = nnx.jit(lambda model, tokens: model(tokens))
    tokens = np.zeros((1, total), np.int32)
    tokens[0, : len(prompt)] = prompt
    for k in range(len(prompt), total):
        tokens[0, k] = np.argmax(predict(model, tokens)[0, k - 1])
    return tokens[0, len(prompt) :].tolist()


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("rope", ["halves", "interleaved"])
def test_cache_changes_nothing(scanned, rope):
    model = Llama(replace(CONFIG, scanned=scanned, rope=rope), rngs=nnx.Rngs(1))
    nnx.update(model, jax.tree.map(lambda x: 2.5 * x, nnx.state(model)))
    prompts = np.random.default_rng(0).integers(0, CONFIG.vocabulary, (2, 7))
    found = generate(model, prompts, count=12).tolist()
    assert found == [without_cache(model, prompt, 12) for prompt in prompts]
    assert len(set(found[0])) > 3


def test_prompts_of_several_lengths_do_not_see_their_padding(model):
    prompts = np.random.default_rng(1).integers(0, CONFIG.vocabulary, (3, 8))
    lengths = np.array([8, 3, 1])
    found = generate(model, prompts, count=9, lengths=lengths)
    for row, prompt, length in zip(found, prompts, lengths, strict=True):
        alone = generate(model, prompt[None, :length], count=9)
        assert row.tolist() == alone[0].tolist()


def test_text_ends_with_the_stop_token(model):
    prompt = np.arange(6)[None]
    free = generate(model, prompt, count=20)[0].tolist()
    stop = free[4]
    first = free.index(stop)
    stopped = generate(model, prompt, count=20, stop=stop)[0].tolist()
    assert stopped == free[: first + 1] + [stop] * (19 - first)


def test_draws_follow_the_probabilities(model):
    prompt = np.full((4000, 1), 5)
    logits = np.asarray(model(jnp.asarray(prompt[:1]))[0, -1], np.float64) / 3.0
    drawn = generate(model, prompt, count=1, temperature=3.0, key=jax.random.key(0))
    shares = np.bincount(drawn[:, 0], minlength=CONFIG.vocabulary) / 4000
    expected = np.exp(logits - logits.max())
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.035)


def test_top_k_draws_from_the_likeliest_alone(model):
    prompt = np.full((500, 1), 5)
    likeliest = np.argsort(np.asarray(model(jnp.asarray(prompt[:1]))[0, -1]))[-3:]
    key = jax.random.key(1)
    drawn = generate(model, prompt, count=1, temperature=9.0, top_k=3, key=key)
    assert set(Counter(drawn[:, 0].tolist())) == set(likeliest.tolist())


def test_key_decides_the_draws(model):
    prompt = np.arange(4)[None]
    one, same, other = (
        generate(model, prompt, count=10, temperature=2.0, key=jax.random.key(k)).tolist()
        for k in (0, 0, 1)
    )
    assert one == same != other


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 61}, "4 tokens and 61 more are 65; the model has 64 positions"),
        ({"count": 0}, "count is 1 or more"),
        ({"count": 1, "lengths": [5]}, "from 1 to 4"),
        ({"count": 1, "lengths": [0]}, "from 1 to 4"),
        ({"count": 1, "lengths": [1, 1]}, "1 numbers from 1 to 4"),
        ({"count": 1, "temperature": -1.0}, "0 or above"),
        ({"count": 1, "temperature": 1.0}, "needs a key"),
        ({"count": 1, "top_k": 49}, "from 1 to 48"),
    ],
)
def test_impossible_settings_are_refused(model, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(model, np.zeros((1, 4), np.int32), **settings)


def test_stories260k_tells_a_story(shared_data):
    folder = shared_data / "weights" / "stories260k"
    model = load_llama(folder / "stories260K.bin", scanned=True)
    tokenizer = load_tokenizer(folder / "tok512.bin")
    prompt = tokenizer.encode("Once upon a time, there was a").ids
    tokens = generate(model, np.array([prompt]), count=120, stop=1)
    story = tokenizer.decode([*prompt, *tokens[0].tolist()])
    assert story.startswith("Once upon a time, there was a little girl named Lily.")
    assert "She" in story and story.count(".") >= 4


def test_smollm2_knows_the_capital_of_italy(smollm2):
    model, tokenizer = load("smollm2-135m"), load_tokenizer(smollm2)
    assert isinstance(model, Llama)
    prompt = tokenizer.encode("The capital of Italy is").ids
    tokens = generate(to_scanned(model), np.array([prompt]), count=4)
    assert "Rome" in tokenizer.decode(tokens[0].tolist())
