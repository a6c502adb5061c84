"""The program of the README, as a user would paste it, on the model that ships with Swarm."""

from __future__ import annotations

import contextlib
import io

from swarm import EMBEDDED_MODEL
from swarm.server import LocalSwarm

PROGRAM = """
import torch, transformers
from swarm import AutoDistributedModelForCausalLM
tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
model = AutoDistributedModelForCausalLM.from_pretrained(MODEL, join=LINK)
opt = torch.optim.Adam(model.parameters(), lr=1e-3)          # only embeddings / adapters
fox = tokenizer("A quick brown fox did not jump over the lazy dog", return_tensors="pt")["input_ids"]
for i in range(100):
    loss = model(input_ids=fox, labels=fox).loss
    opt.zero_grad(); loss.backward(); opt.step()
inputs = tokenizer("A quick brown fox", return_tensors="pt")["input_ids"]
print(tokenizer.decode(model.generate(inputs, max_new_tokens=7)[0]))
"""


def test_the_program_learns_its_sentence():
    with LocalSwarm(EMBEDDED_MODEL, ranges=[(0, 2), (2, 4), (4, 6)], in_process=True) as swarm:
        printed = io.StringIO()
        names = {"MODEL": EMBEDDED_MODEL, "LINK": swarm.link}
        with contextlib.redirect_stdout(printed):
            exec(PROGRAM, names)
        names["model"].close()
    assert names["loss"].item() < 0.1
    assert printed.getvalue().strip() == "A quick brown fox did not jump over the lazy dog"
