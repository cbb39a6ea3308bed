# SPDX-License-Identifier: Apache-2.0
"""What settings of an evaluation may be; the command line shows it without importing torch."""

from typing import Literal, get_args

Split = Literal["dev", "test"]
Mode = Literal["auto", "verify", "decode", "generate", "label-free"]
SPLITS: tuple[Split, ...] = get_args(Split)
MODES: tuple[Mode, ...] = get_args(Mode)
