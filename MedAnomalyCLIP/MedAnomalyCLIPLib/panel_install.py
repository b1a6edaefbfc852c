"""Installs the Python packages that are missing in Slicer, after one question that names them all.

PyTorch comes through Slicer's PyTorch extension, the rest through Slicer's pip. Packages that Slicer brings
keep their versions. What is asked of Slicer goes through `SlicerEnvironment`.
"""

from __future__ import annotations

import importlib
import json
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import qt
import slicer
from slicer.i18n import tr as _

from .errors import Cancelled, DependencyMissing, InvalidRequest
from .panel_packages import FULL, LIGHT
from .panel_words import size_words
from .readiness import (
    InstallPlan,
    Package,
    check_packages,
    frozen_versions,
    installed_version,
    lacking_wheels,
    plan_installation,
)
from .resources import resource_path

PYTORCH_EXTENSION = "PyTorch"
_REQUESTER = "MedAnomalyCLIP"
_PENDING_SETTING = "MedAnomalyCLIP/PendingInstallation"

Tell = Callable[[str], None]


class SlicerEnvironment:
    """What installing asks of Slicer and of the reader."""

    def __init__(self, *, light: bool = False) -> None:
        """`light` leaves out PyTorch and what stands on it."""
        self._requirements = resource_path(LIGHT if light else FULL)

    def packages(self) -> tuple[Package, ...]:
        return check_packages(self._requirements)

    def confirm(self, title: str, text: str) -> bool:
        """Ask the reader. In testing mode, where Slicer's own questions answer yes, nothing is installed."""
        return not slicer.app.testingEnabled() and slicer.util.confirmOkCancelDisplay(text, title)

    def pytorch_logic(self) -> Any | None:
        """Logic of the PyTorch extension, None if it is not loaded."""
        try:
            return importlib.import_module("PyTorchUtils").PyTorchUtilsLogic()
        except ImportError:
            return None

    def install_extension(self, name: str) -> bool:
        """Fetch and install an extension; it is loaded by the next start of Slicer."""
        model = slicer.app.extensionsManagerModel()
        interactive = model.interactive
        model.interactive = False  # the reader has agreed, and is asked about the restart by us
        try:
            return bool(model.installExtensionFromServer(name, False))
        finally:
            model.interactive = interactive

    def restart(self) -> None:
        slicer.util.restart()

    def pip_install(
        self, requirements: Sequence[str], constraints: Path, options: Sequence[str] = ()
    ) -> None:
        """Run pip, whose progress Slicer shows since 5.12; it also says when a restart is needed.

        Raises:
            CalledProcessError, RuntimeError: pip failed.
        """
        try:
            packaging = importlib.import_module("slicer.packaging")
        except ImportError:
            slicer.util.pip_install([*options, *requirements, "-c", str(constraints)])
            return
        if options:
            packaging.pip_install([*options, *requirements], constraints=constraints, requester=_REQUESTER)
        else:
            packaging.pip_ensure(
                list(requirements), constraints=constraints, prompt_install=False, requester=_REQUESTER
            )

    def installed_version(self, name: str) -> str:
        return installed_version(name)


class Installer:
    """Brings a Slicer to where a detector can run. Main thread only."""

    def __init__(self, environment: Any = None, tell: Tell | None = None) -> None:
        """
        Args:
            environment: what is asked of Slicer; a `SlicerEnvironment` if None.
            tell: called with a line about each step.
        """
        self._slicer = environment or SlicerEnvironment()
        self._tell = tell or (lambda line: None)

    def install(self, *, ask: bool = True, wheels: Path | str | None = None) -> None:
        """Install what is missing, if anything is.

        Args:
            ask: show what would be installed, and install nothing unless the reader agrees.
            wheels: folder to install from, without any network; None for the usual sources.

        Raises:
            Cancelled: the reader declined, or Slicer has to be restarted first.
            DependencyMissing: something could not be installed; the message says what to do.
            InvalidRequest: called on another thread than Slicer's main one.
        """
        if threading.current_thread() is not threading.main_thread():
            raise InvalidRequest(_("Packages can only be installed on Slicer's main thread"))
        plan = plan_installation(self._slicer.packages(), self._slicer.installed_version)
        if plan.blocked:
            words = _(
                "This Slicer has packages that are too old: {names} is needed. They are not replaced,"
                " since other parts of Slicer rely on them. Use a newer Slicer; for torch, uninstall it in"
                " the module PyTorch Utils, restart Slicer, and click Install again."
            )
            raise DependencyMissing(words.format(names=", ".join(plan.blocked)))
        if not plan:
            _forget_pending()
            return
        if wheels:
            self._install_offline(plan, Path(wheels), ask)
        else:
            self._install_online(plan, ask)
        self._check()

    def resume(self) -> bool:
        """Go on after the restart that an installation asked for; False if none did.

        The reader is asked again only if other packages are missing now than those agreed to.

        Raises:
            as `install`.
        """
        agreed = _pending()
        if agreed is None:
            return False
        plan = plan_installation(self._slicer.packages(), self._slicer.installed_version)
        if plan.torch and self._slicer.pytorch_logic() is None:
            raise Cancelled(_restart_words())
        _forget_pending()  # whatever happens now, it does not happen at every start
        self.install(ask=not set(plan.requirements) <= set(agreed))
        return True

    def _install_offline(self, plan: InstallPlan, folder: Path, ask: bool) -> None:
        if not folder.is_dir():
            raise DependencyMissing(_("{folder} is no folder of wheels").format(folder=folder))
        lacking = lacking_wheels(folder, plan.requirements)
        if lacking:
            words = _(
                "{folder} has no wheel for this computer of: {names}. Fetch them with pip download on a"
                " computer with the same system and Python."
            )
            raise DependencyMissing(words.format(folder=folder, names=", ".join(lacking)))
        self._ask(ask, consent_words(plan, folder=folder))
        self._pip(plan.requirements, ["--no-index", "--find-links", str(folder)])

    def _install_online(self, plan: InstallPlan, ask: bool) -> None:
        pytorch = self._slicer.pytorch_logic() if plan.torch else None
        extension_missing = bool(plan.torch) and pytorch is None
        self._ask(ask, consent_words(plan, extension_missing=extension_missing))
        if extension_missing:
            self._install_extension(plan, ask)
        if plan.torch:
            self._install_torch(pytorch, plan.torch)
        if plan.packages:
            self._pip(plan.packages)
        _forget_pending()

    def _ask(self, ask: bool, text: str) -> None:
        if ask and not self._slicer.confirm(_("MedAnomalyCLIP: install Python packages"), text):
            raise Cancelled(_("Nothing was installed."))

    def _install_extension(self, plan: InstallPlan, ask: bool) -> None:
        self._tell(_("Installing Slicer's extension {name}").format(name=PYTORCH_EXTENSION))
        if not self._slicer.install_extension(PYTORCH_EXTENSION):
            words = _(
                "Slicer's extension {name} could not be installed. Is there a network? Install it in the"
                " Extensions Manager, restart Slicer, and click Install again; or name a folder of wheels."
            )
            raise DependencyMissing(words.format(name=PYTORCH_EXTENSION))
        qt.QSettings().setValue(_PENDING_SETTING, json.dumps(plan.requirements))
        words = _(
            "Slicer has to be restarted to load the extension {name}. Save your work first. When you open"
            " MedAnomalyCLIP after that, the installation goes on.\n\nRestart now?"
        )
        if ask and self._slicer.confirm(_("Restart Slicer"), words.format(name=PYTORCH_EXTENSION)):
            self._slicer.restart()
        raise Cancelled(_restart_words())

    def _install_torch(self, pytorch: Any, requirement: str) -> None:
        self._tell(_("Installing {names}").format(names=requirement))
        versions = requirement.removeprefix("torch")
        try:
            torch = pytorch.installTorch(askConfirmation=False, torchVersionRequirement=versions)
        except (CalledProcessError, RuntimeError, OSError, ImportError) as error:
            raise self._failure(requirement, error) from error
        if torch is None:
            raise self._failure(requirement, _("the PyTorch extension installed nothing"))

    def _pip(self, requirements: Sequence[str], options: Sequence[str] = ()) -> None:
        names = ", ".join(requirements)
        self._tell(_("Installing {names}").format(names=names))
        with tempfile.TemporaryDirectory(prefix="medanomalyclip-") as folder:
            # Written now: torch may have come since the plan was made, and is kept too.
            constraints = Path(folder) / "constraints.txt"
            constraints.write_text(frozen_versions(self._slicer.installed_version), encoding="utf-8")
            try:
                self._slicer.pip_install(requirements, constraints, options)
            except (CalledProcessError, RuntimeError, OSError) as error:
                raise self._failure(names, error) from error

    def _failure(self, names: str, reason: object) -> DependencyMissing:
        words = _(
            "{names} could not be installed: {reason}. The Python console has pip's own words. Mend the"
            " cause, and click Install again; what is there already is kept."
        )
        return DependencyMissing(words.format(names=names, reason=reason))

    def _check(self) -> None:
        importlib.invalidate_caches()
        missing = [package.requirement for package in self._slicer.packages() if not package.satisfied]
        if missing:
            words = _(
                "Still missing after the installation: {names}. Restart Slicer and click Install again."
            )
            raise DependencyMissing(words.format(names=", ".join(missing)))
        self._tell(_("All packages are installed"))


def consent_words(plan: InstallPlan, *, extension_missing: bool = False, folder: Path | None = None) -> str:
    """What the reader agrees to: every package, its room, where it comes from, what is left alone."""
    torch_names = ("torch", "torchvision")
    through_pytorch = [entry for entry in plan.takes if plan.torch and entry[0] in torch_names]
    others = [entry for entry in plan.takes if entry not in through_pytorch]
    lines = [_("These Python packages will be installed into Slicer:"), ""]
    if folder is not None:
        lines += [_("From {folder}, without network:").format(folder=folder), _listed(plan.takes)]
    else:
        if extension_missing:
            lines += [
                _("Slicer's extension {name}, which needs a restart.").format(name=PYTORCH_EXTENSION),
                "",
            ]
        if through_pytorch:
            lines += [
                _("Through the extension {name}, with its helper light-the-torch:").format(
                    name=PYTORCH_EXTENSION
                ),
                _listed(through_pytorch),
                _("With an NVIDIA GPU, torch comes with CUDA and takes several GB."),
                "",
            ]
        if others:
            lines += [_("From the Python Package Index (pypi.org):"), _listed(others)]
    lines += [
        "",
        _("About {size} in all, measured under Linux without CUDA; newer versions may differ.").format(
            size=size_words(plan.megabytes)
        ),
        _("Slicer's own numpy, SciPy, SimpleITK and an installed torch keep their versions."),
        _("No model is fetched: the detector that comes with this extension works at once."),
    ]
    return "\n".join(lines)


def _listed(takes: Sequence[tuple[str, float]]) -> str:
    """Large packages with their room, the many small ones in one line."""
    large = [(name, size) for name, size in takes if size >= 5]
    small = [(name, size) for name, size in takes if size < 5]
    words = [f"  {name} ({size_words(size)})" for name, size in large]
    if small:
        names = ", ".join(name for name, _size in small)
        words.append(f"  {names} ({size_words(sum(size for _name, size in small))})")
    return "\n".join(words)


def _restart_words() -> str:
    words = _(
        "Restart Slicer to load the extension {name}; the installation goes on after that. If you have, see"
        " whether the Extensions Manager has it enabled."
    )
    return words.format(name=PYTORCH_EXTENSION)


def installation_pending() -> bool:
    """Whether an installation waits for the restart that Slicer has had since."""
    return _pending() is not None


def _pending() -> list[str] | None:
    """Requirements that the reader agreed to before a restart; None if none wait."""
    try:
        agreed = json.loads(qt.QSettings().value(_PENDING_SETTING, ""))
    except (ValueError, TypeError):
        return None
    return agreed if isinstance(agreed, list) else None


def _forget_pending() -> None:
    qt.QSettings().remove(_PENDING_SETTING)
