"""One of four real ranks on the CPU that share out experts: `python -m tests.tracing.four_experts RANK FOLDER`; see two_experts.py."""

from __future__ import annotations

from .two_experts import MODELS, of_four
from .two_ranks import main

if __name__ == "__main__":
    main(of_four(), ranks=4, config=MODELS["qwen3_moe"])
