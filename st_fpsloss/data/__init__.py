"""Click logs: read and checked, split, and turned into pairs of a history and the next item; public logs to try."""

from st_fpsloss.data.clicks import load_clicks, load_inputs
from st_fpsloss.data.completejourney import CompleteJourney, load_completejourney
from st_fpsloss.data.movielens import MovieLens100K, load_movielens_100k
from st_fpsloss.data.next_item import histories, next_item_pairs, next_item_windows
from st_fpsloss.data.splits import hold_out, leave_last_out, split_by_time

__all__ = [
    "CompleteJourney",
    "MovieLens100K",
    "histories",
    "hold_out",
    "leave_last_out",
    "load_clicks",
    "load_completejourney",
    "load_inputs",
    "load_movielens_100k",
    "next_item_pairs",
    "next_item_windows",
    "split_by_time",
]
