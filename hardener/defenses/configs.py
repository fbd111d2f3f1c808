"""The table of defences' settings, by the name that a recipe gives under `defense`."""

from __future__ import annotations

from hardener.defenses.settings import Settings
from hardener.defenses.sophon_configs import SophonConfig, SophonWideConfig
from hardener.defenses.trap_configs import CtrapAdaptiveConfig, CtrapConfig, CtrapRolloutConfig

CONFIGS: dict[str, type[Settings]] = {
    "ctrap": CtrapConfig,
    "ctrap-rollout": CtrapRolloutConfig,
    "ctrap-adaptive": CtrapAdaptiveConfig,
    "sophon": SophonConfig,
    "sophon-wide": SophonWideConfig,
}
