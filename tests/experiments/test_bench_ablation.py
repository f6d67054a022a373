"""The run that array runs are timed against is the same agent: it is shown the same and learns by the same update."""

import jax
import numpy as np
import pytest

from envs_bridge.household.engine import Household
from experiments.bench_ablation import Config as Bench
from experiments.bench_ablation import TextPlayer, main, time_text
from proxmo_jax import cli
from proxmo_jax.ablation import vector_household as vh
from proxmo_jax.ablation.vector_agent import show


def test_the_text_player_shows_what_the_array_household_shows():
    from test_vector_household import ADMISSIBLE, STEP, games

    played = games("easy", 12)
    houses, texts = vh.build(played)
    rng = np.random.default_rng(0)
    shown = jax.jit(show, static_argnums=3)
    for h, game in enumerate(played):
        player, world, house = TextPlayer(game, texts, houses, h), Household(game), vh.pick(houses, h)
        state, text, said = vh.reset(house), world.reset().text, np.asarray(house.start)
        commands = len(vh.COMMANDS) + player.places + 3 * player.things
        used, last = np.zeros(commands, np.float32), -1
        for _ in range(25):
            ours, words = player.see(world, text, used, last)
            row = np.pad(said, (0, player.length - len(said)))
            theirs = shown(house, state, row, len(texts.pieces), np.log1p(used), np.arange(commands) == last)
            for name in ("bag", "held", "flags", "used", "last", "in_place", "possible"):
                np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
            assert sorted(ours.text[ours.text > 0]) == sorted(row[row > 0])
            number = int(rng.choice(np.flatnonzero(ADMISSIBLE(house, state))))
            assert number in words
            seen = world.step(words[number])
            state, said, won = STEP(house, state, number)
            text, said = seen.text, np.asarray(said)
            assert bool(won) == seen.done
            used[number] += 1
            last = number
            if seen.done:
                break


@pytest.mark.slow
def test_a_run_in_the_text_engine_is_timed():
    update, turn = time_text(1)
    assert 0 < turn < update


def test_benchmarks_refuse_nonsense(capsys):
    with pytest.raises(ValueError, match="--iterations must be a multiple of 10, got 15"):
        main(Bench(iterations=15))
    assert cli.main(["bench", "ablation", "--seeds", "0"]) == 2
    assert "--seeds must be at least 1, got 0" in capsys.readouterr().err
