"""A stand-in for the Slicer application, so that our module can be clicked through without one.

What is real here: MRML, the slice views' logic and drawing, segmentations, colours, transforms, subject
hierarchy, `slicer.util`. They are Slicer's own C++ and Python, from the wheel `slicer-core`. Also real: our
module file, its .ui file, and Qt itself (PySide6).

What is a stand-in, and where it lies:

- `pythonqt`: Slicer reaches Qt through PythonQt, we through PySide6 with its manners changed. PySide6 accepts
  some calls that PythonQt may not (keyword arguments in constructors, scoped enums, new Signals).
- `ctk_standins`, `qmrml_standins`: small widgets of our own with the properties and signals that our panel
  uses. They look different from Slicer's, and know nothing that is not written there.
- A .ui file's `mrmlSceneChanged(vtkMRMLScene*)` connections are not made by Qt here; the qMRMLWidget stand-in
  passes the scene to its children itself. In Slicer a missing connection leaves a selector empty, so a test
  reads the .ui file's text for them.
- `base_python`: `slicer.ScriptedLoadableModule` and `slicer.parameterNodeWrapper`, as far as our module goes.
- `application`: no main window, no layout manager, no subject hierarchy plugins (nodes get no hierarchy item
  by themselves), no colour files, no terminologies, no DICOM database. `slicer.app.testingEnabled()` is true,
  `slicer.i18n` knows no other language.

So a pass says "works on Slicer's libraries". Packaging, PythonQt itself, Windows and macOS are not covered.
"""
