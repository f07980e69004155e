/* `git archive` puts the commit here (see .gitattributes), so that the program knows what it was
 * built from. In a checkout it stays as it is. */
#define KATA_REVISION "$Format:%H$"
