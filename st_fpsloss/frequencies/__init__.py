"""How often each row is drawn: what the ``log_q`` correction subtracts."""

from st_fpsloss.frequencies.sketch import FrequencySketch
from st_fpsloss.frequencies.table import Frequencies, FrequencyTable

__all__ = [
    "Frequencies",
    "FrequencySketch",
    "FrequencyTable",
]
