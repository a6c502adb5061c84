#!/usr/bin/env python3
"""Compare every causal-LM type of the installed transformers, cut into three spans, with the whole model.

Writes docs/models.md; ends with status 1 if a type that is not refused is not exact. Names of types restrict the run
and write nothing. Takes about five minutes on one core.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "model"))

from exact import compare  # noqa: E402
from tiny_configs import tiny_config  # noqa: E402

from swarm.errors import UnsupportedModel  # noqa: E402
from swarm.model import families  # noqa: E402
from swarm.model.anatomy import anatomy_of  # noqa: E402

HEADER = """# Models

Written by `scripts/sweep_models.py` with transformers {version}: do not edit.

Each causal-LM type of transformers was built with a tiny random config (4 blocks, fp32), saved, cut into the ranges
0:1, 1:3 and 3:4 and a client half, and compared with the whole model: logits with and without left padding (error at
most 1e-5), 16 greedy tokens with and without left padding (equal), gradients of the input embeddings (error at most
1e-4). **{num_exact} types are exact**; {num_refused} are refused by name, with the reason below.

Rewind says where a session can go back to: `any` position, or `step`, which means to before the newest step or to the
start, because linear attention keeps a state that cannot be cut.

| Type | | Rewind |
|---|---|---|
"""


def judge(model_type: str) -> tuple[str, str]:
    """Return a verdict ("exact", "refused" or "WRONG") and its detail: kind of rewind, reason, or error."""
    reason = families.REFUSED.get(model_type)
    if reason is not None:
        return "refused", reason
    try:
        config = tiny_config(model_type)
        anatomy_of(config)
    except UnsupportedModel as exc:
        return "refused", str(exc)
    with tempfile.TemporaryDirectory() as directory:
        comparison = compare(model_type, Path(directory))
    if not comparison.exact:
        return "WRONG", str(comparison)
    return "exact", "any" if comparison.can_rewind else "step"


def main(names: list[str]) -> int:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    verdicts = {}
    for model_type in names or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        verdicts[model_type] = judge(model_type)
        print(model_type, *verdicts[model_type], flush=True)
    num_exact = sum(verdict == "exact" for verdict, _ in verdicts.values())
    unverified = {name for name, (verdict, _) in verdicts.items() if verdict == "exact"} - families.VERIFIED
    if unverified:
        print("exact, but not in families.VERIFIED:", *sorted(unverified))
    if not names:
        rows = [
            f"| {name} | {verdict} | {detail} |" if verdict == "exact" else f"| {name} | {verdict}: {detail} | |"
            for name, (verdict, detail) in verdicts.items()
        ]
        header = HEADER.format(
            version=transformers.__version__, num_exact=num_exact, num_refused=len(verdicts) - num_exact
        )
        (ROOT / "docs").mkdir(exist_ok=True)
        (ROOT / "docs" / "models.md").write_text(header + "\n".join(rows) + "\n")
    return int(any(verdict == "WRONG" for verdict, _ in verdicts.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
