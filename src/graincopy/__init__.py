"""graincopy: snapshot coarse, copy fine, never merge.

The nine stages of a backup and the package that owns each of them:

1. request                  ``cli``, ``app``
2. workload → files         ``workloads``
3. files → volumes          ``volumes`` (topology, drivers)
4. thin targets             ``volumes`` (drivers)
5. freeze, snapshot, thaw   ``volumes`` (instant, freeze)
6. change map               ``volumes`` (drivers), ``model`` (central computation)
7. attach T                 ``volumes`` (attach)
8. dirty grains → medium    ``transfer``, ``repository``, ``media``
9. publish, clean, notify   ``workflow``, ``repository``
"""

__version__ = "0.1.0"
