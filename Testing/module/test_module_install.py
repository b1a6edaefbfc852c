"""Installing what is missing: one question, and what comes of every answer."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from subprocess import CalledProcessError
from types import ModuleType, SimpleNamespace

import pytest

from MedAnomalyCLIPLib.errors import Cancelled, DependencyMissing, InvalidRequest
from MedAnomalyCLIPLib.readiness import Package

pytestmark = pytest.mark.usefixtures("hosted_module")

PENDING = "MedAnomalyCLIP/PendingInstallation"
LINES = ("monai>=1.4", "torch>=2.8", "open_clip_torch>=3.3", "numpy>=1.26", "scikit-image>=0.22")


class FakeSlicer:
    """A Slicer without a network whose pip keeps a diary.

    Attributes:
        installed: names of packages that are there.
        did: what was asked of it, in order.
    """

    def __init__(self, *installed, extension=True, agrees=True):
        self.installed = {"numpy", *installed}
        self.old = {}
        self.did = []
        self.agrees = agrees
        self.questions = []
        self.extension_can_be_fetched = True
        self.pip_fails = None
        self.pip_works = True
        self.constraints = ""
        self._extension = extension

    def packages(self):
        def state(line):
            name = line.split(">=")[0]
            return Package(line, name, self.installed_version(name), name in self.installed)

        return tuple(state(line) for line in LINES)

    def confirm(self, title, text):
        self.questions.append((title, text))
        return self.agrees

    def pytorch_logic(self):
        if not self._extension:
            return None

        def install(askConfirmation, torchVersionRequirement):
            self.did.append(("torch", torchVersionRequirement, askConfirmation))
            self.installed.add("torch")
            return object()

        return SimpleNamespace(installTorch=install)

    def install_extension(self, name):
        self.did.append(("extension", name))
        return self.extension_can_be_fetched

    def restart(self):
        self.did.append(("restart",))

    def installed_version(self, name):
        return self.old.get(name, "99" if name in self.installed else "")

    def pip_install(self, requirements, constraints, options=()):
        self.did.append(("pip", *options, *requirements))
        self.constraints = constraints.read_text()
        if self.pip_fails:
            raise self.pip_fails
        if self.pip_works:
            self.installed |= {line.split(">=")[0] for line in requirements}


def installer(environment, tell=None):
    from MedAnomalyCLIPLib.panel_install import Installer

    return Installer(environment, tell)


def pending():
    from harness.pythonqt import qt

    return qt.QSettings().value(PENDING, "")


def test_torch_comes_through_its_extension_and_the_rest_through_pip():
    slicer = FakeSlicer()
    installer(slicer).install()
    assert slicer.did == [
        ("torch", ">=2.8", False),
        ("pip", "monai>=1.4", "open_clip_torch>=3.3", "scikit-image>=0.22"),
    ]


def test_one_question_names_every_package_with_its_size_and_source():
    slicer = FakeSlicer()
    installer(slicer).install()
    ((_, text),) = slicer.questions
    for words in ("torch (698 MB)", "torchvision (21 MB)", "monai (7 MB)", "timm", "regex", "pypi.org"):
        assert words in text
    assert "light-the-torch" in text
    assert "GB" in text
    assert "numpy (" not in text


def test_pip_may_not_change_what_is_installed_nor_the_torch_that_just_came():
    slicer = FakeSlicer()
    installer(slicer).install()
    assert slicer.constraints == "numpy==99\ntorch==99\n"


def test_declined_consent_installs_nothing():
    slicer = FakeSlicer(agrees=False)
    with pytest.raises(Cancelled, match="Nothing was installed"):
        installer(slicer).install()
    assert slicer.did == []


def test_a_script_that_has_asked_already_is_not_asked():
    slicer = FakeSlicer(agrees=False)
    installer(slicer).install(ask=False)
    assert slicer.questions == []
    assert slicer.did


def test_all_that_is_needed_is_there_so_nothing_happens():
    slicer = FakeSlicer("monai", "torch", "open_clip_torch", "scikit-image")
    installer(slicer).install()
    assert (slicer.did, slicer.questions) == ([], [])


def test_only_what_is_missing_is_installed_and_named():
    slicer = FakeSlicer("monai", "torch", "scikit-image")
    installer(slicer).install()
    assert slicer.did == [("pip", "open_clip_torch>=3.3")]
    assert "monai" not in slicer.questions[0][1]


@pytest.mark.parametrize(
    "error", [CalledProcessError(1, "pip"), RuntimeError("no network"), OSError("full disk")]
)
def test_a_failing_pip_says_what_to_do(error):
    slicer = FakeSlicer("torch")
    slicer.pip_fails = error
    with pytest.raises(DependencyMissing, match=r"could not be installed: .*click Install again"):
        installer(slicer).install()


def test_a_pip_that_says_it_worked_but_did_not_is_noticed():
    slicer = FakeSlicer("torch")
    slicer.pip_works = False
    with pytest.raises(DependencyMissing, match="Still missing"):
        installer(slicer).install()


def test_a_torch_that_the_extension_does_not_install_is_noticed():
    slicer = FakeSlicer()
    slicer.pytorch_logic = lambda: SimpleNamespace(installTorch=lambda **_: None)
    with pytest.raises(DependencyMissing, match=r"torch>=2\.8 could not be installed"):
        installer(slicer).install()
    assert slicer.did == []


def test_packages_of_slicer_that_are_too_old_are_not_replaced():
    slicer = FakeSlicer()
    slicer.old = {"torch": "2.2.2"}
    with pytest.raises(DependencyMissing, match=r"too old: torch>=2\.8 is needed"):
        installer(slicer).install()
    assert (slicer.did, slicer.questions) == ([], [])


def test_another_thread_may_not_install():
    caught = []

    def run():
        try:
            installer(FakeSlicer()).install()
        except InvalidRequest as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert "main thread" in str(caught[0])


# The PyTorch extension


def test_a_missing_extension_is_named_in_the_question_installed_and_the_rest_waits():
    slicer = FakeSlicer(extension=False)
    with pytest.raises(Cancelled, match="Restart Slicer"):
        installer(slicer).install()
    assert slicer.did == [("extension", "PyTorch"), ("restart",)]
    assert "extension PyTorch, which needs a restart" in slicer.questions[0][1]
    assert "Save your work first" in slicer.questions[1][1]
    assert set(json.loads(pending())) == set(LINES) - {"numpy>=1.26"}


def test_slicer_is_not_restarted_against_the_readers_will():
    slicer = FakeSlicer(extension=False)
    slicer.confirm = lambda title, text: not title.startswith("Restart")
    with pytest.raises(Cancelled):
        installer(slicer).install()
    assert ("restart",) not in slicer.did
    assert pending()


def test_after_the_restart_it_goes_on_without_asking_again():
    with pytest.raises(Cancelled):
        installer(FakeSlicer(extension=False)).install()
    restarted = FakeSlicer()
    assert installer(restarted).resume()
    assert restarted.questions == []
    assert [step[0] for step in restarted.did] == ["torch", "pip"]
    assert not pending()
    assert not installer(restarted).resume()


def test_after_the_restart_it_asks_again_if_more_is_missing_than_was_agreed_to():
    with pytest.raises(Cancelled):
        installer(FakeSlicer("monai", extension=False)).install()
    restarted = FakeSlicer(agrees=False)
    with pytest.raises(Cancelled, match="Nothing was installed"):
        installer(restarted).resume()
    assert len(restarted.questions) == 1
    assert restarted.did == []


def test_opening_the_panel_before_the_restart_installs_nothing_and_forgets_nothing():
    with pytest.raises(Cancelled):
        installer(FakeSlicer(extension=False)).install()
    not_restarted = FakeSlicer(extension=False)
    with pytest.raises(Cancelled, match="Restart Slicer"):
        installer(not_restarted).resume()
    assert (not_restarted.did, not_restarted.questions) == ([], [])
    assert pending()


def test_an_installation_that_fails_after_the_restart_is_not_tried_at_every_start():
    with pytest.raises(Cancelled):
        installer(FakeSlicer(extension=False)).install()
    restarted = FakeSlicer()
    restarted.pip_fails = RuntimeError("no network")
    with pytest.raises(DependencyMissing):
        installer(restarted).resume()
    assert not installer(restarted).resume()


@pytest.mark.parametrize("value", ["", "not json", "3", None])
def test_damaged_settings_resume_nothing(value):
    from harness.pythonqt import qt

    qt.QSettings().setValue(PENDING, value)
    slicer = FakeSlicer()
    assert not installer(slicer).resume()
    assert slicer.did == []


def test_an_extension_that_cannot_be_fetched_says_what_to_do():
    slicer = FakeSlicer(extension=False)
    slicer.extension_can_be_fetched = False
    with pytest.raises(DependencyMissing, match="Extensions Manager"):
        installer(slicer).install()
    assert not pending()


# Offline


def wheels(folder, *names):
    for name in names:
        (folder / f"{name}-99-py3-none-any.whl").touch()
    return folder


def test_a_folder_of_wheels_is_all_that_pip_may_use(tmp_path):
    folder = wheels(tmp_path, "monai", "torch", "open_clip_torch", "scikit_image")
    slicer = FakeSlicer(extension=False)
    installer(slicer).install(wheels=folder)
    ((kind, *words),) = slicer.did
    assert kind == "pip"
    assert words[:3] == ["--no-index", "--find-links", str(folder)]
    assert set(words[3:]) == set(LINES) - {"numpy>=1.26"}
    assert "pypi.org" not in slicer.questions[0][1]
    assert str(folder) in slicer.questions[0][1]
    assert slicer.constraints == "numpy==99\n"


def test_a_folder_that_lacks_a_wheel_is_refused_before_anything_is_asked(tmp_path):
    slicer = FakeSlicer()
    with pytest.raises(DependencyMissing, match=r"no wheel .* of: torch>=2\.8, .*open_clip_torch"):
        installer(slicer).install(wheels=wheels(tmp_path, "monai", "scikit_image"))
    assert (slicer.did, slicer.questions) == ([], [])


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DependencyMissing, match="no folder of wheels"):
        installer(FakeSlicer()).install(wheels=tmp_path / "nowhere")


# What is asked of Slicer itself


@pytest.fixture
def environment():
    from MedAnomalyCLIPLib.panel_install import SlicerEnvironment

    return SlicerEnvironment()


def test_in_testing_mode_nothing_is_agreed_to(environment, slicer_application, monkeypatch):
    """Slicer's own questions are documented to answer yes then."""
    import slicer

    monkeypatch.setattr(slicer.util, "confirmOkCancelDisplay", lambda text, title: True)
    assert not environment.confirm("Title", "?")
    monkeypatch.setattr(slicer_application, "testingEnabled", lambda: False)
    assert environment.confirm("Title", "?")


def test_slicers_packaging_is_used_where_it_exists(environment, monkeypatch):
    calls = []
    packaging = ModuleType("slicer.packaging")
    packaging.pip_ensure = lambda *words, **options: calls.append(("ensure", *words, options))
    packaging.pip_install = lambda *words, **options: calls.append(("install", *words, options))
    monkeypatch.setitem(sys.modules, "slicer.packaging", packaging)
    environment.pip_install(("monai>=1.4",), Path("c.txt"))
    environment.pip_install(("monai>=1.4",), Path("c.txt"), ["--no-index"])
    common = {"constraints": Path("c.txt"), "requester": "MedAnomalyCLIP"}
    assert calls == [
        ("ensure", ["monai>=1.4"], {"prompt_install": False, **common}),
        ("install", ["--no-index", "monai>=1.4"], common),
    ]


def test_slicers_older_pip_is_used_where_it_does_not(environment, monkeypatch):
    import slicer

    calls = []
    monkeypatch.setitem(sys.modules, "slicer.packaging", None)
    monkeypatch.setattr(slicer.util, "pip_install", calls.append)
    environment.pip_install(("monai>=1.4",), Path("c.txt"), ["--no-index"])
    assert calls == [["--no-index", "monai>=1.4", "-c", "c.txt"]]


def test_the_pytorch_extension_is_found_only_when_it_is_loaded(environment, monkeypatch):
    monkeypatch.setitem(sys.modules, "PyTorchUtils", None)
    assert environment.pytorch_logic() is None
    loaded = ModuleType("PyTorchUtils")
    loaded.PyTorchUtilsLogic = lambda: "logic"
    monkeypatch.setitem(sys.modules, "PyTorchUtils", loaded)
    assert environment.pytorch_logic() == "logic"


def test_an_extension_is_installed_without_slicers_own_questions_and_without_a_restart(
    environment, slicer_application, monkeypatch
):
    calls = []

    class Model:
        interactive = True

        def installExtensionFromServer(self, name, restart):
            calls.append((name, restart, self.interactive))
            return True

    model = Model()
    monkeypatch.setattr(slicer_application, "extensionsManagerModel", lambda: model, raising=False)
    assert environment.install_extension("PyTorch")
    assert calls == [("PyTorch", False, False)]
    assert model.interactive


def test_what_is_there_is_read_from_the_modules_own_requirements(environment):
    names = [package.name for package in environment.packages()]
    assert {"torch", "monai", "open_clip_torch", "numpy"} <= set(names)
    assert environment.installed_version("numpy")
    assert environment.installed_version("no-such-package") == ""
