"""Tools for networks: layers, copies, runs, edits of the module tree, data flow."""
