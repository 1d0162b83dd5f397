"""Every key of a run, and what follows from them: the schema, the points, the resources.

After the first step of a command nobody reads a file or a flag; they read these.
"""

from rvdist.core.config.points import (
    BASELINE,
    MOST_CANDIDATES,
    PLACEHOLDERS,
    RECIPE,
    Saved,
    Storage,
    alphas,
    arms,
    called,
    candidates,
    examined,
    lines,
    method,
    outputs,
    point,
    published,
    require_name,
    require_recipe_alone,
    saved,
    spell,
)  # fmt: skip
from rvdist.core.config.resources import (
    cache_directory,
    device,
    engine_timeouts,
    engines,
    require_resources,
    workers,
)  # fmt: skip
from rvdist.core.config.schema import (
    CHOICES,
    DTYPES,
    PLAIN,
    STAGES,
    AnalyzeConfig,
    ArmConfig,
    BatchConfig,
    BenchmarksConfig,
    CacheConfig,
    ClusterConfig,
    CompatConfig,
    Config,
    DonorsConfig,
    EachConfig,
    EngineConfig,
    HubConfig,
    MaskConfig,
    MergeConfig,
    OutputFormat,
    SearchConfig,
    SweepConfig,
    VectorConfig,
    WeightedVectorConfig,
    size,
    stages,
)  # fmt: skip

__all__ = [
    "BASELINE", "CHOICES", "DTYPES", "MOST_CANDIDATES", "PLACEHOLDERS", "PLAIN", "RECIPE", "STAGES",
    "AnalyzeConfig", "ArmConfig", "BatchConfig", "BenchmarksConfig", "CacheConfig", "ClusterConfig", "CompatConfig",
    "Config", "DonorsConfig", "EachConfig", "EngineConfig", "HubConfig", "MaskConfig", "MergeConfig",
    "OutputFormat", "Saved", "SearchConfig", "Storage", "SweepConfig", "VectorConfig", "WeightedVectorConfig",
    "alphas", "arms", "cache_directory", "called", "candidates", "device", "engine_timeouts", "engines", "examined",
    "lines", "method", "outputs", "point", "published", "require_name", "require_recipe_alone", "require_resources",
    "saved", "size", "spell", "stages", "workers",
]  # fmt: skip
