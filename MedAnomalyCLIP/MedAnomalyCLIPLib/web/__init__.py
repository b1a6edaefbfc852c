"""The panel's experience in a browser, without Slicer installed, on Slicer's own libraries.


`application` makes a scene that the module's logic works on as it does in Slicer; `study` brings images into
it; `reader` and `volume_reader` tie what the page shows to that logic; `page` is the page; `server` serves it
to one reader, `launcher` to several, each by a process of their own.

trame-slicer brings an earlier slicer-core than the one that the tests stand on, so it is an extra with an
environment of its own: `pip install 'medanomalyclip[web]'`. Nothing of it is imported before it is used.
"""
