"""`import ctk`: the CTK widgets of our panel, with the properties and signals that it uses."""

from __future__ import annotations

import sys
import types
from typing import Any

from PySide6.QtCore import Property, Qt, Signal

from .pythonqt import custom_widgets, qt

_HEAD_HEIGHT = 24
_UNLIMITED = 16777215  # QWIDGETSIZE_MAX
_STEPS = 1000


class ctkCollapsibleButton(qt.QWidget):
    """A titled section that folds away."""

    contentsCollapsed = Signal(bool)
    declared_signals = ("contentsCollapsed(bool)",)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._head = qt.QToolButton(self)
        self._head.setObjectName("")
        self._head.setCheckable(True)
        self._head.setChecked(True)
        self._head.setToolButtonStyle(Qt.ToolButtonStyle.ToolButtonTextBesideIcon)
        self._head.setStyleSheet(
            "QToolButton {text-align: left; border: 1px solid palette(mid); border-radius: 3px;"
            " background: palette(midlight); padding: 2px; font-weight: bold}"
        )
        self._head.toggled.connect(self._fold)
        self._shown: list[Any] = []  # what was visible when the section was folded
        self.setContentsMargins(0, _HEAD_HEIGHT, 0, 0)
        self._head.setArrowType(Qt.ArrowType.DownArrow)

    def resizeEvent(self, event: Any) -> None:
        self._head.setGeometry(0, 0, self.width, _HEAD_HEIGHT)

    def _fold(self, open_: bool) -> None:
        self._head.setArrowType(Qt.ArrowType.DownArrow if open_ else Qt.ArrowType.RightArrow)
        if not open_:
            widgets = [child for child in self.children() if isinstance(child, qt.QWidget)]
            self._shown = [child for child in widgets if child is not self._head and not child.isHidden()]
        for child in self._shown:
            child.setVisible(open_)
        self.setMaximumHeight(_UNLIMITED if open_ else _HEAD_HEIGHT)
        self.contentsCollapsed.emit(not open_)

    def _set_text(self, value: str) -> None:
        self._head.setText(value)

    def _set_collapsed(self, value: bool) -> None:
        self._head.setChecked(not value)

    text = Property(str, lambda self: self._head.text, _set_text)
    collapsed = Property(bool, lambda self: not self._head.checked, _set_collapsed)


class ctkPathLineEdit(qt.QWidget):
    """A path to type or to choose; here only to type."""

    currentPathChanged = Signal(str)
    declared_signals = ("currentPathChanged(QString)",)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        layout = qt.QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        self._edit = qt.QLineEdit(self)
        self._edit.setObjectName("")
        self._browse = qt.QToolButton(self)
        self._browse.setObjectName("")
        self._browse.setText("...")
        layout.addWidget(self._edit)
        layout.addWidget(self._browse)
        self._edit.textChanged.connect(self.currentPathChanged.emit)

    currentPath = Property(str, lambda self: self._edit.text, lambda self, path: self._edit.setText(path))
    filters = Property(int, lambda self: 1, lambda self, value: None)


class ctkSliderWidget(qt.QWidget):
    """A slider and a spin box of floating-point numbers."""

    valueChanged = Signal(float)
    declared_signals = ("valueChanged(double)",)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        layout = qt.QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        self._slider = qt.QSlider(Qt.Orientation.Horizontal, self)
        self._slider.setRange(0, _STEPS)
        self._spin = qt.QDoubleSpinBox(self)
        self._spin.setRange(0, 99)
        for part in (self._slider, self._spin):
            part.setObjectName("")
            layout.addWidget(part)
        self._slider.valueChanged.connect(self._slid)
        self._spin.valueChanged.connect(self._spun)

    def _slid(self, step: int) -> None:
        low, high = self._spin.minimum, self._spin.maximum
        self._spin.setValue(low + (high - low) * step / _STEPS)

    def _spun(self, value: float) -> None:
        self._place_slider()
        self.valueChanged.emit(value)

    def _place_slider(self) -> None:
        low, high = self._spin.minimum, self._spin.maximum
        self._slider.blockSignals(True)
        self._slider.setValue(round(_STEPS * (self._spin.value - low) / ((high - low) or 1)))
        self._slider.blockSignals(False)

    def _set_minimum(self, value: float) -> None:
        self._spin.setMinimum(value)
        self._place_slider()

    def _set_maximum(self, value: float) -> None:
        self._spin.setMaximum(value)
        self._place_slider()

    value = Property(float, lambda self: self._spin.value, lambda self, v: self._spin.setValue(v))
    minimum = Property(float, lambda self: self._spin.minimum, _set_minimum)
    maximum = Property(float, lambda self: self._spin.maximum, _set_maximum)
    singleStep = Property(
        float, lambda self: self._spin.singleStep, lambda self, v: self._spin.setSingleStep(v)
    )
    decimals = Property(int, lambda self: self._spin.decimals, lambda self, v: self._spin.setDecimals(v))
    suffix = Property(str, lambda self: self._spin.suffix, lambda self, v: self._spin.setSuffix(v))


class ctkRangeWidget(qt.QWidget):
    """Two numbers within limits; Slicer's has a slider with two handles between them."""

    valuesChanged = Signal(float, float)
    declared_signals = ("valuesChanged(double,double)",)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        layout = qt.QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        self._low, self._high = qt.QDoubleSpinBox(self), qt.QDoubleSpinBox(self)
        for part in (self._low, self._high):
            part.setObjectName("")
            layout.addWidget(part)
            part.valueChanged.connect(self._changed)

    def _changed(self, _value: float) -> None:
        self._low.setMaximum(self._high.value)
        self._high.setMinimum(self._low.value)
        self.valuesChanged.emit(self._low.value, self._high.value)

    def _set_minimum(self, value: float) -> None:
        self._low.setMinimum(value)
        self._changed(value)

    def _set_maximum(self, value: float) -> None:
        self._high.setMaximum(value)
        self._changed(value)

    def _set_low(self, value: float) -> None:
        self._low.setMaximum(self._high.maximum)
        self._low.setValue(value)

    def _set_high(self, value: float) -> None:
        self._high.setValue(value)

    def _set_decimals(self, value: int) -> None:
        for part in (self._low, self._high):
            part.setDecimals(value)

    minimum = Property(float, lambda self: self._low.minimum, _set_minimum)
    maximum = Property(float, lambda self: self._high.maximum, _set_maximum)
    minimumValue = Property(float, lambda self: self._low.value, _set_low)
    maximumValue = Property(float, lambda self: self._high.value, _set_high)
    decimals = Property(int, lambda self: self._low.decimals, _set_decimals)
    singleStep = Property(
        float, lambda self: self._low.singleStep, lambda self, v: self._low.setSingleStep(v)
    )


ctk = types.ModuleType("ctk")
for _class in (ctkCollapsibleButton, ctkPathLineEdit, ctkRangeWidget, ctkSliderWidget):
    setattr(ctk, _class.__name__, _class)
    custom_widgets[_class.__name__] = _class
sys.modules.setdefault("ctk", ctk)
