"""Where tasks come from: sources, and the readers that make them."""

from metafit.data import packaged
from metafit.data.arrays import from_arrays, from_file, from_huggingface
from metafit.data.folder import from_folder
from metafit.data.gaussian_process import GaussianProcesses
from metafit.data.readers import read
from metafit.data.sampler import Draw, Tasks, TaskSampler
from metafit.data.sinusoid import Sinusoids
from metafit.data.source import Source, Splits
from metafit.data.synthetic_tables import SyntheticTables
from metafit.data.tables import Table, from_csv, from_parquet, table

__all__ = [
    "Draw",
    "GaussianProcesses",
    "Sinusoids",
    "Source",
    "Splits",
    "SyntheticTables",
    "Table",
    "TaskSampler",
    "Tasks",
    "from_arrays",
    "from_csv",
    "from_file",
    "from_folder",
    "from_huggingface",
    "from_parquet",
    "packaged",
    "read",
    "table",
]
