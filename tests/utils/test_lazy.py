import subprocess
import sys

import st_fpsloss
import st_fpsloss.towers


def test_every_public_name_is_there_and_listed():
    for package in (st_fpsloss, st_fpsloss.towers):
        assert set(package.__all__) <= set(dir(package))
        for name in package.__all__:
            assert getattr(package, name).__name__ == name


def test_the_import_is_light_and_features_are_read_without_torch():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['sentence_transformers'] = None\n"
        "import st_fpsloss\n"
        "from st_fpsloss.towers import Categorical\n"
        "assert Categorical('genre', vocabulary=['drama']).array(['drama', None]).tolist() == [2, 0]\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
