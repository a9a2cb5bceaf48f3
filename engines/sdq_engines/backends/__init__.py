"""One module per engine behind one small protocol; a backend is imported only when it is asked for."""
