"""A pool without processes, whose worlds say what a script says, and a small policy that plays in it."""

import jax

from envs_bridge.turn import Observation
from proxmo_jax.agent.player import Limits, Player
from proxmo_jax.policy.decoder import PolicyConfig
from proxmo_jax.policy.sampling import Decoding
from proxmo_jax.policy.sharding import make_mesh
from proxmo_jax.policy.tokenizer import build_word_tokenizer


class ScriptedPool:
    """`script(slot, attempt, turn)` is what a world answers: turn 0 is the reset; None is a lost episode."""

    fault = "lost by the script"

    def __init__(self, script):
        self.script, self.attempts, self.turns, self.asked = script, {}, {}, []

    def reset(self, games):
        answers = []
        for slot, _ in games:
            self.attempts[slot], self.turns[slot] = self.attempts.get(slot, -1) + 1, 0
            seen = self.script(slot, self.attempts[slot], 0)
            answers.append(seen and (seen, "task"))
        return answers

    def send_step(self, commands):
        self.asked = [slot for slot, _ in commands]

    def receive(self):
        for slot in self.asked:
            self.turns[slot] += 1
        return [self.script(slot, self.attempts[slot], self.turns[slot]) for slot in self.asked]


def say(text: str, **rest) -> Observation:
    return Observation(text, ("look",), **rest)


def small_player(folder, mesh=None, **limits) -> Player:
    tokenizer = build_word_tokenizer(["task : seen hand last now at new look word is on the table"], folder)
    config = PolicyConfig(vocab_size=64, hidden_size=32, intermediate_size=48, head_dim=8, num_hidden_layers=1)
    decoding = Decoding(2, (tokenizer.eos_token_id,), tokenizer.pad_token_id)
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    return Player(tokenizer, config, Limits(**{"turns": 3, "prompt": 64, "response": 2, **limits}), mesh, decoding)
