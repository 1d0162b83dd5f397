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
    alpha_text,
    alphas,
    arms,
    candidates,
    lines,
    method,
    outputs,
    point,
    repositories,
    require_name,
    require_recipe_alone,
    vector_name,
    vector_points,
    vector_to_save,
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
    "alpha_text", "alphas", "arms", "cache_directory", "candidates", "device", "engine_timeouts", "engines",
    "lines", "method", "outputs", "point", "repositories", "require_name", "require_recipe_alone",
    "require_resources", "size", "stages", "vector_name", "vector_points", "vector_to_save", "workers",
]  # fmt: skip
