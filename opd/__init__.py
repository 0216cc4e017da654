"""`opd`: many domain specialists, distilled on-policy into one student."""
